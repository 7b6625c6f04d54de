// Package mount drives the built mount helper and hook against the real nydusd,
// without containerd and without the snapshotter: it makes the mount option
// itself and calls the helper as mount.fuse3, mount(8) and an administrator do.
//
// TestImages makes images of every kind with content by chance, and compares them in every
// way in which they are served:
//
//	IMAGES_SEED=N    repeats a run
//	IMAGES_ROUNDS=N  how many times (1), from the second on with more content
//
// TestPowerCut makes 10 power cuts for each way to keep a cache; POWER_CUTS=N asks for
// another number, POWER_SEED=N for the same chances.
//
// Do not add tests here that need a container manager; those belong to the end
// to end tests.
package mount
