package config

import (
	"fmt"
	"strings"
)

// Fault is one thing that is wrong.
type Fault struct {
	// Key is the dotted key, empty when the fault is the file's as a whole.
	Key string `json:"key,omitempty"`
	// Line counts from 1; 0 when the fault has no line, because the value is a
	// default, comes from the command line, or is missing.
	Line int `json:"line,omitempty"`
	// Problem says what is wrong and what is right.
	Problem string `json:"problem"`
}

// String is the fault in one line, without the file's name.
func (f Fault) String() string {
	text := f.Problem
	if f.Key != "" {
		text = f.Key + ": " + text
	}
	if f.Line > 0 {
		text = fmt.Sprintf("line %d: %s", f.Line, text)
	}
	return text
}

// Error is every fault of one configuration.
type Error struct {
	// Name says where the configuration comes from, usually a file.
	Name string
	// Faults are in the order of their lines, those without a line last.
	Faults []Fault
}

// Error lists the faults, each on a line of its own.
func (e *Error) Error() string {
	if len(e.Faults) == 1 {
		return fmt.Sprintf("configuration %s: %s", e.Name, e.Faults[0])
	}
	var b strings.Builder
	fmt.Fprintf(&b, "configuration %s has %d faults:", e.Name, len(e.Faults))
	for _, f := range e.Faults {
		b.WriteString("\n  " + f.String())
	}
	return b.String()
}
