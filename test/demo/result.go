package main

import (
	"strconv"
	"time"
)

// result is everything that the demo measured. Sizes are in bytes; a zero in a
// part that was not reached means nothing.
type result struct {
	OK     bool   `json:"ok"`
	Reason string `json:"reason,omitempty"`

	Versions struct {
		Containerd string `json:"containerd"`
		Nydusd     string `json:"nydusd"`
	} `json:"versions"`

	Image struct {
		Bytes  int64 `json:"bytes"` // in the registry
		Layers int   `json:"layers"`
		Files  int   `json:"files"`
	} `json:"image"`

	Pull struct {
		Bytes   int64   `json:"bytes"`
		Seconds seconds `json:"seconds"`
		Daemons int     `json:"daemons"`
	} `json:"pull"`

	First struct {
		UpSeconds      seconds `json:"up_seconds"`      // until the container's process runs
		ProgramSeconds seconds `json:"program_seconds"` // python, from exec to its exit
		FetchedBytes   int64   `json:"fetched_bytes"`   // so far, the pull included
	} `json:"first_container"`

	Daemon struct {
		PID           int    `json:"pid"`
		RSS           int64  `json:"rss_bytes"`
		Cgroup        string `json:"cgroup"`
		Parent        int    `json:"parent_pid"`
		SnapshotterID int    `json:"snapshotter_pid"`
	} `json:"nydusd"`

	Second struct {
		UpSeconds seconds `json:"up_seconds"`
		Daemons   int     `json:"daemons"`
	} `json:"second_container"`

	// Succeeded is right after nydusd was killed; PID is its successor.
	Succeeded struct {
		PID int `json:"pid"`
		reading
	} `json:"read_after_nydusd_was_killed"`

	// Read is with everything up, Orphaned with the snapshotter killed.
	Read     reading `json:"read"`
	Orphaned reading `json:"read_without_snapshotter"`

	End struct {
		FetchedBytes int64   `json:"fetched_bytes"` // in all
		RSS          int64   `json:"nydusd_rss_bytes"`
		GoneSeconds  seconds `json:"gone_seconds"` // from the last process's end to nydusd's
	} `json:"end"`
}

// reading is some files of a container, read and compared with the source.
type reading struct {
	Files        int     `json:"files"`
	Bytes        int64   `json:"bytes"`
	Seconds      seconds `json:"seconds"`
	FetchedBytes int64   `json:"fetched_bytes"` // by this reading alone
}

// seconds is a duration that JSON shows as seconds.
type seconds time.Duration

func (s seconds) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, time.Duration(s).Seconds(), 'f', 6, 64), nil
}
