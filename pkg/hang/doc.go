// Package hang finds daemons that hang, and gets them out of the way of whoever
// waits for them: a process that waits for the answer to a request which its daemon
// has taken cannot even be killed, so a container could not be deleted.
//
// What it promises: a daemon that stays stopped (SIGSTOP, a debugger) while somebody
// waits for it is dealt with when the bound is over, or up to a look earlier, since
// when it began to hang is known no better. So is one that does not run at
// all although somebody waits, after a minute at the most: until then it might be
// waiting for a registry, and one that does is left alone. What can be succeeded
// (Generation.Kept) is killed, and a successor goes on; what cannot is aborted: its
// users get errors and end, and the next mount of the image starts another daemon.
// Each is an event in the log. So is a daemon that is too busy to answer.
//
// It looks at the kernel's count of unanswered requests (fusectl) and at /proc, and
// touches no mount; that idle daemons answer is asked now and then in a child.
//
// Users of a hung daemon are not helped while it does not run. Do not use it to
// find daemons that have died: pidfds tell that at once.
package hang
