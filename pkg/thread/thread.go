// Package thread runs functions on operating system threads of their own, for what Linux
// keeps by thread and Go by process: namespaces, working directory, files, signal masks.
//
// What it promises: the thread ends after the function, with whatever that made of it, and
// it is never the main thread. That one ends with the process only, and /proc/self shows
// what it has: its namespaces, its files.
//
// Do not use it for anything that need not be undone: a thread costs some 50 µs.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Throwaway runs f on a thread that ends afterwards, and returns when f does.
func Throwaway(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f() // and stays locked
			return
		}
		// As long as this goroutine holds the main thread, no other gets it.
		Throwaway(f)
		runtime.UnlockOSThread()
	}()
	<-done
}
