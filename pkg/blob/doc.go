// Package blob looks after the cache directories, in which nydusd keeps what it has
// fetched: which blobs are there, how much they take, who needs them, whether they are
// right, and what may go.
//
// What the package promises:
//
//   - A blob is in use when the bootstrap of a snapshot or of a living instance names it,
//     read from that file. No annotation and no daemon is asked.
//   - What an instance may be reading is never removed, whatever moment it begins at.
//   - What nothing names is removed once it is older than a grace period, and above a high
//     watermark what no instance reads, least recently used first: it is fetched again on
//     demand.
//   - A process that is killed at any instruction leaves nothing wrong. Proofs that name a
//     blob (package proof) and its presence maps go first, and that is written to disk
//     before its data goes: data without a map is fetched anew, but a map without data
//     makes nydusd serve zeros.
//   - When a bootstrap cannot be read, nothing is removed from its cache directory.
//   - A file that it does not know is left alone, and reported.
//
// Do not use it to decide that a blob's bytes are right without [Cache.Verify]: a map is
// nydusd's claim (see package chunkmap).
//
// # Data that goes wrong
//
// [Cache.Scrub] finds what a disk has made of data that was right. It reads directly
// (O_DIRECT), since the page cache may still have what the disk has lost, and leaves the
// page cache as it was. Where a filesystem cannot do that it reads through the page cache,
// and drops what nobody had there before.
//
// A filesystem with fs-verity could have the kernel compare each read of a blob that is
// complete, also beneath EROFS: package proof, which is written when all of a blob was
// compared, would be the place to enable it (FS_IOC_ENABLE_VERITY; it makes the file
// read-only for good, so nydusd must not have it open) and to demand it again. That is
// not done.
//
// # Why nothing is taken from under a daemon
//
// nydusd opens a blob's map first and its data second, both by name, and keeps both open.
// A daemon that has both open loses nothing when their names go: it goes on with its own
// two files. One that opened the map before the names went and the data afterwards would
// believe the old map and make new, empty data: zeros, silently. So it must not be in
// between, and two things see to it:
//
//   - Whoever removes holds an exclusive lock (flock) of the cache directory and reads the
//     instances' records under it. Whoever mounts writes the instance's record first, then
//     waits for that lock, and starts or asks a daemon last (pkg/instance, Readers). So an
//     instance is either seen, and its blobs stay, or its daemon opens nothing before
//     everything is gone. A few blobs are removed under one lock: a mount waits some
//     milliseconds.
//   - An exclusive lease (fcntl, F_SETLEASE) of each file is taken first, which the kernel
//     refuses while anybody has it open or mapped: daemons that no record knows, as inside
//     of Kata, or the kernel's EROFS. They are left alone. While the lease is held the map
//     is cut to nothing before its name goes, so that one who was just opening it finds no
//     chunk in it. A filesystem without leases has the first guard alone.
//
// A directory private/NAME of an older nydusd is that daemon's alone; nothing is removed
// from it without the daemon's own lock, which it holds for as long as it lives.
package blob
