// Package instance keeps one filesystem per image: the record of it, the lock
// around it, making it, using it and letting it go.
//
// An instance is known by its key (mountspec.InstanceKey) and has a directory in
// the run directory, RUN/i/KEY:
//
//	lock            flock: whoever changes anything here holds it
//	record.json     Record, replaced by rename
//	u/HASH          one User per overlay made by the mount helper
//	gN/mnt          the mountpoint of the N-th daemon of this instance
//	gN/api.sock     its API; of the N-th successor it is sN.sock
//	gN/config.json  its configuration with credentials, mode 0600, on tmpfs
//	gN/env.json     its environment beside PATH, if it has one, mode 0600, on tmpfs
//
// and one on disk, ROOT/instances/KEY, with the daemon's log and a hard link to
// the bootstrap, so that the daemon does not depend on the snapshot.
//
// What it promises:
//
//   - However many mounts ask for an image at once, one daemon starts.
//   - The kernel is the reference count. To release an instance is to detach its
//     one mountpoint: the daemon ends by itself once no overlay, bind or open
//     file can reach it. A release that comes too early costs a second daemon
//     for the next container, never a running one its files.
//   - Whatever instruction a process was killed at, the next Ensure or the next
//     pass of the Reconciler recognises what it left and cleans it up.
//   - No daemon that serves is ever signalled.
//
// Do not use it to find out what an image contains or whether its cache is
// complete, and do not remove anything in an instance's directory without its
// lock.
package instance
