// Package crash kills the parts of a running node at random moments, while
// containers read what they know the content of: nothing may fail, be wrong or
// hang, and nothing may be left.
//
// TestMatrix has a cell for each victim, daemon, style and mode. TestSoak does
// everything that a node does in random order. TestDaemonless takes images to mounts
// without a daemon and back, and kills all that has a part in it. TestFetch has images
// completed, and kills those who do that; both have a cell for each style and mode. All
// take their chances from a seed, which they print:
//
//	CRASH_SEED=N       repeats a run: the same cells, the same deeds
//	CRASH_KILLS=N      kills in each cell (2), of TestDaemonless (12) and TestFetch (8)
//	CRASH_CELLS=all    every cell instead of a pairwise sample, of TestFetch instead of one
//	SOAK_TIME=DURATION how long TestSoak goes on (60s)
//
// What a failure shows: the seed, the history of deeds, the ends of all logs.
//
// Readers are a process of their own, so that what hangs there does not hang the
// test; a watchdog then aborts the FUSE connections. Every wait is for an event or
// has a bound of minutes: no test here may depend on how fast the machine is.
package crash
