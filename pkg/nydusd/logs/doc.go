// Package logs looks after the logs of nydusd, which are files that each daemon
// appends to by itself, so that it depends on nobody.
//
// What it promises:
//
//   - Cut bounds a log while its daemon writes to it. A daemon neither notices nor
//     fails, whatever happens to whoever cuts.
//   - A Follower bounds the logs of all instances, and passes their lines on to a
//     slog.Logger with the fields of the instance. It waits for events (inotify),
//     remembers in the file how far it got, and passes a line on once, also over its
//     own end (one that is killed may repeat the last lines). Errors and warnings
//     keep their level, the rest becomes debug.
//   - What a daemon writes is not trusted: lines are cut to length, what is not
//     printable is escaped, what looks like a credential is hidden, and a flood is
//     counted instead of passed on.
//
// The files themselves hold what the daemon wrote, so they are for root only. Do not
// use it for logs that are written without O_APPEND: after a cut they would go on at
// their old offset.
package logs
