// Package show is what the project's programs for people (demo, bench) share: a
// session on the kit that ends orderly on Ctrl-C, a line of progress, and
// figures written for readers.
//
// It promises that a session's clean-up has run when Run returns, and that
// progress goes to the writer it was made with and never into the results.
//
// Do not use it in tests: those have testing.T and say nothing while they pass.
package show
