// Package rootfs mounts and unmounts: the overlay that is a container's root
// filesystem, binds of an image, the tmpfs of the run directory. It is the only
// package with mount system calls, and reads the mount table for the others.
//
// It promises that a call which fails has mounted nothing, that detaching what
// is not mounted is no error, and that no function here touches a path on a
// mount in order to learn about it: the mount table says what is mounted, even
// when the filesystem behind it no longer answers. The one exception is
// ReadAhead, which opens an EROFS that was mounted just before: behind that is
// the kernel alone.
//
// An id-mapped mount takes a user namespace, and so for a moment a process that
// is in it: it is stopped before its first instruction, and ends as soon as the
// namespace is open here.
//
// Do not use it to decide whether an image is in use; that is pkg/instance's.
package rootfs
