// Package conventions holds the project's rules that need the whole tree or the
// dependency graph to be checked: what a binary may link, that every package
// says what it is for, that samples and documentation agree with the code.
//
// Each rule carries its reason, and a failure names the file to change. Rules
// that a look at one file can decide are in .golangci.yml instead. There is
// nothing to import here.
package conventions
