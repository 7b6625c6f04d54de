// Package guest shows in a virtual machine what the kernel of the machine that
// runs the tests may not have: cgroup version 2 with all its controllers, and a
// FUSE that asks again what a dead daemon had not answered. The test boots Debian's
// kernel with an initial RAM disk of the project's static programs, nydusd and two
// images; guest/init is the first process there and reports over a serial port.
//
// Not for what the machine itself can show: everything is emulated, and slow.
package guest

// Where things are in the guest.
const (
	// Images has a directory for each image: see Image.
	Images = "/images"
	// Nydusd is the real one, Snapshotter, Helper and Module what their names say.
	Nydusd      = "/bin/nydusd"
	Snapshotter = "/bin/nydus-snapshotter"
	Helper      = "/bin/nydus-overlayfs"
	Module      = "/overlay.ko.xz"
	// Console is where Report goes.
	Console = "/dev/ttyS1"
	// CgroupParent is where the daemons live, two levels down.
	CgroupParent = "/nydus.slice/daemons"
)

// What the limited image's daemon may use.
const (
	MemoryLimit = 96 << 20
	CPULimit    = 5000 // thousandths of a core: more than there is
)

// Names of the images. Limited has limits, Other has none.
const (
	Limited = "limited"
	Other   = "other"
)

// Image is the file files.json of an image's directory, beside its bootstrap and
// the directory blobs.
type Image struct {
	// Files has the SHA-256 of each file's content, in hex.
	Files map[string]string
}

// Report is all that the guest has to say, one line of JSON.
type Report struct {
	// Fault is what went wrong with the guest itself; empty for nothing.
	Fault string
	// Kernel is its version.
	Kernel string
	// Controllers are those that the cgroups on the way to the daemons pass on, by
	// directory.
	Controllers map[string]string
	// Born is what each process in a daemon's place saw before it became nydusd, in
	// their order, for the limited image; Successor among them.
	Born []Birth
	// OtherBorn is the same for the other one.
	OtherBorn []Birth
	// Kills counts the processes killed for memory, by image.
	Kills map[string]int
	// Killed is the limited image's daemon before, Succeeded after the kill; Served
	// and Serves are the other one's.
	Killed, Succeeded, Served, Serves int
	// Restarts counts the limited image's successors.
	Restarts int
	// Reads and Wrong count reads and those that failed or gave other bytes, by
	// image. Slowest is the longest in milliseconds.
	Reads, Wrong map[string]int
	Slowest      map[string]int
	// ReadsAfter are reads that began after the successor served.
	ReadsAfter int
	// FirstFault is the first of the wrong reads.
	FirstFault string
	// Left is what was left when nothing was mounted any more.
	Left []string
	// Log is the end of the snapshotter's log.
	Log string
}

// Birth is what a process sees when it starts in a daemon's place.
type Birth struct {
	PID       int
	Cgroup    string // its line of /proc/self/cgroup
	MemoryMax string
	CPUMax    string
	Successor bool
}
