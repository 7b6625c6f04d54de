// Package nydusd writes nydusd's configuration and starts the process. It is
// the only package that does.
//
// It promises that a daemon it started is in a session and a cgroup of its own,
// keeps no descriptor of its starter but the cache lock, and has SIGINT and
// SIGTERM blocked: nydusd answers both by detaching a filesystem that is in
// use, while the end of its last mount ends it anyway. So nothing here, and
// nothing elsewhere, signals a daemon that serves.
//
// Do not use it to learn whether an image is mounted or in use (pkg/instance,
// pkg/rootfs), nor to talk to a running daemon.
package nydusd
