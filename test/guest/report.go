// Package guest shows in a virtual machine what the machine that runs the tests may
// not have: cgroup version 2 with all its controllers, a FUSE that asks again what a
// dead daemon had not answered, and systemd as the first process. The test boots
// Debian's kernel with an initial RAM disk of systemd, the project's static programs
// and units, nydusd and two images; guest/init runs there as a service and reports
// over a serial port.
//
// Not for what the machine itself can show: everything is emulated, and slow.
package guest

// Where things are in the guest.
const (
	// Images has a directory for each image: see Image.
	Images = "/images"
	// Bin has the project's programs, where the unit looks for them; Init is
	// guest/init.
	Bin  = "/usr/local/bin"
	Init = "/usr/local/bin/guest-init"
	// Nydusd is the real one, Module the kernel's overlayfs.
	Nydusd = "/usr/bin/nydusd"
	Module = "/overlay.ko.xz"
	// Console is where Report goes.
	Console = "/dev/ttyS1"
	// CgroupParent is where the daemons live, as recommended with systemd.
	CgroupParent = "/nydus.slice/daemons"
	// Stand takes nydusd's place: see Birth. Engine plays containerd.
	Stand  = "/usr/bin/stand"
	Engine = "/usr/bin/engine"
	// SnapshotterUnit is the project's, EngineUnit runs Engine.
	SnapshotterUnit = "nydus-snapshotter.service"
	EngineUnit      = "engine.service"
	// SnapshotterLog is where its standard error goes.
	SnapshotterLog = "/snapshotter.log"
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
	// directory, after all that systemd did.
	Controllers map[string]string
	// Born is what each process in a daemon's place saw before it became nydusd, in
	// their order, for the limited image; Successor among them.
	Born []Birth
	// OtherBorn is the same for the other one.
	OtherBorn []Birth
	// Units has a line about each thing that was done to units while containers read:
	// what, and which daemon served the limited image before and after.
	Units []Unit
	// MemoryMax and CPUMax are what is in force at the end.
	MemoryMax, CPUMax string
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

// Unit is one thing that was done to a unit.
type Unit struct {
	Did           string
	Before, After int
}

// Birth is what a process sees when it starts in a daemon's place.
type Birth struct {
	PID       int
	Cgroup    string // its line of /proc/self/cgroup
	MemoryMax string
	CPUMax    string
	Successor bool
}
