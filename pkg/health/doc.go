// Package health sees what a daemon hides that says it is running: that it could
// not fetch the metadata of a blob. After 20 seconds (2.2) to a minute (2.4) of
// tries it gives up, and every read of that blob is an error until the daemon is
// replaced, also when the registry has long been back.
//
// What it promises: Log tells it from what the daemon writes, which is the one place
// where it shows, reading each byte once, and however the file is cut or set aside
// meanwhile. Answers tells whether the registry gives that blob out again, asked as
// the daemon asks, within its context; so a daemon is not replaced in vain. Neither
// repeats a credential.
//
// With a log level of "error" daemons do not write it. Do not use this package for
// chunks that could not be fetched: those are tried again at the next read.
package health
