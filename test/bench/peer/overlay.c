/*
 * bench-overlay SOURCE TARGET -o OPTIONS: mounts an overlay and does nothing
 * else. Called by mount.fuse3 it is the least that a mount helper written in
 * any language can take: what the project's own helper is compared with.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>

int main(int argc, char **argv)
{
	char *data, *flags;

	if (argc != 5 || strcmp(argv[3], "-o") != 0) {
		fprintf(stderr, "usage: bench-overlay SOURCE TARGET -o OPTIONS\n");
		return 1;
	}
	/* mount.fuse3 puts flags such as dev and suid behind; none needs a bit. */
	data = strstr(argv[4], "lowerdir=");
	if (data == NULL) {
		fprintf(stderr, "bench-overlay: no lowerdir\n");
		return 1;
	}
	flags = strstr(data, ",dev");
	if (flags != NULL)
		*flags = '\0';
	if (mount("overlay", argv[2], "overlay", 0, data) != 0) {
		perror("bench-overlay: mount");
		return 1;
	}
	return 0;
}
