// Package config is the snapshotter's configuration: defaults, over them one
// strict TOML file, over that the command line, and then validation of the
// whole.
//
// What the package promises:
//
//   - Every fault is reported at once, with its line where it has one: unknown
//     keys, wrong types, values out of range and impossible combinations. One
//     kind does not hide another; only a file that is no TOML at all is reported
//     alone.
//   - A value that the file sets is never replaced by a default, even when it is
//     zero, empty or false.
//   - The result is a plain value. There is nothing global, and nothing in the
//     package reads the environment or touches the machine.
//
// Do not use it for what belongs to one image or one mount (pkg/mountspec), nor
// to look at paths: that they exist is for whoever uses them to find out.
package config
