// Package probe asks mounted filesystems whether they answer. A daemon that was
// stopped keeps whoever asks it for as long as it stays so; therefore a child asks,
// which can be killed.
//
// What it promises: an Ask ends at its bound whatever hangs, touches no mount in
// the calling process, and asks what no cache can answer (statfs). The child holds
// no file on a mount, ends with its parent, and one child asks for all mounts. A
// child that cannot be killed, because a daemon took its question and was stopped
// before the answer, is left behind and reaped when it ends; its mounts count as
// not answering until then and are not asked again, so that there is one such child
// for each daemon at the most.
//
// An answer says that the daemon has a thread to spare, not that it can fetch
// data; see package health for that. No answer says that it hangs or is busy.
package probe
