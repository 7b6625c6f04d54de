package guest_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nydusfs/nydus-snapshotter/test/guest"
	"github.com/nydusfs/nydus-snapshotter/test/kit"
)

func TestMain(m *testing.M) { kit.Main(m) }

// bootTimeout bounds the whole life of the guest, which takes less than a minute on an idle
// machine. It is for an emulator or a boot that hangs: the scenario is bounded in the guest.
const bootTimeout = 15 * time.Minute

var programs = []string{"nydus-snapshotter", "nydus-overlayfs", "nydus-shim-hook"}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Under systemd, limits of cgroup version 2 hold from a daemon's first instruction on
// and whatever is done to units; a daemon that is killed for memory is succeeded
// without any reader noticing; other images do not notice at all.
func TestLimitsUnderSystemd(t *testing.T) {
	kit.Baseline(t)
	r := boot(t)
	if r.Fault != "" {
		t.Fatalf("the guest failed: %s", r.Fault)
	}
	t.Logf("Linux %s, %v reads, %d after the kill, slowest %v ms", r.Kernel, r.Reads, r.ReadsAfter, r.Slowest)
	for _, dir := range []string{"/", "/nydus.slice", guest.CgroupParent} {
		for _, c := range []string{"memory", "cpu"} {
			if !strings.Contains(" "+r.Controllers[dir]+" ", " "+c+" ") {
				t.Errorf("cgroup %s passes on %q, not %s", dir, r.Controllers[dir], c)
			}
		}
	}
	born(t, r)
	units(t, r)
	// A successor may come before the memory is free again.
	if r.Kills[guest.Limited] < 1 || r.Restarts != r.Kills[guest.Limited] || r.Killed == r.Succeeded || r.Succeeded == 0 {
		t.Errorf("%d kills for memory, %d restarts, nydusd %d then %d; want a kill and a successor", r.Kills[guest.Limited], r.Restarts, r.Killed, r.Succeeded)
	}
	if r.Kills[guest.Other] != 0 || r.Served == 0 || r.Served != r.Serves {
		t.Errorf("the other image: %d kills for memory, nydusd %d then %d; want it as it was", r.Kills[guest.Other], r.Served, r.Serves)
	}
	for _, image := range []string{guest.Limited, guest.Other} {
		if r.Reads[image] == 0 || r.Wrong[image] != 0 {
			t.Errorf("image %s: %d of %d reads failed or were wrong: %s", image, r.Wrong[image], r.Reads[image], r.FirstFault)
		}
	}
	if r.ReadsAfter == 0 {
		t.Error("nothing was read after the kill")
	}
	if len(r.Left) > 0 {
		t.Errorf("left behind: %q", r.Left)
	}
	if t.Failed() {
		t.Logf("the snapshotter's log:\n%s", r.Log)
	}
}

// born checks what the daemons saw before their first instruction.
func born(t *testing.T, r guest.Report) {
	t.Helper()
	if len(r.Born) != 1+r.Restarts || r.Born[0].Successor || !r.Born[1].Successor {
		t.Fatalf("started for the limited image: %+v; want a daemon and a successor", r.Born)
	}
	for _, b := range r.Born {
		if !strings.HasPrefix(b.Cgroup, "0::"+guest.CgroupParent+"/") || b.Cgroup != r.Born[0].Cgroup {
			t.Errorf("nydusd %d started in %q, want its own below %s, and the successor in the same", b.PID, b.Cgroup, guest.CgroupParent)
		}
		if want := strconv.Itoa(guest.MemoryLimit); b.MemoryMax != want {
			t.Errorf("nydusd %d started with memory.max %q, want %s", b.PID, b.MemoryMax, want)
		}
		if want := strconv.Itoa(guest.CPULimit*100) + " 100000"; b.CPUMax != want {
			t.Errorf("nydusd %d started with cpu.max %q, want %s", b.PID, b.CPUMax, want)
		}
	}
	if len(r.OtherBorn) != 1 || r.OtherBorn[0].MemoryMax != "max" || r.OtherBorn[0].Cgroup == r.Born[0].Cgroup {
		t.Errorf("started for the other image: %+v; want one daemon without limits, in a cgroup of its own", r.OtherBorn)
	}
}

// units checks that nothing that was done to units reached a daemon or its limits.
func units(t *testing.T, r guest.Report) {
	t.Helper()
	if len(r.Units) != 6 {
		t.Errorf("done to units: %+v; want six things", r.Units)
	}
	for n, u := range r.Units {
		want := r.Killed
		if n >= 3 {
			want = r.Succeeded
		}
		if u.Before != want || u.After != want {
			t.Errorf("systemctl %s: nydusd %d served before it, %d after it; want %d", u.Did, u.Before, u.After, want)
		}
	}
	if r.MemoryMax != strconv.Itoa(guest.MemoryLimit) || r.CPUMax != strconv.Itoa(guest.CPULimit*100)+" 100000" {
		t.Errorf("in force in the end: memory.max %q, cpu.max %q", r.MemoryMax, r.CPUMax)
	}
}

// boot runs the guest to its end.
func boot(t *testing.T) (r guest.Report) {
	t.Helper()
	tools := kit.MustTools(t)
	dir := t.TempDir()
	initrd, console, report := filepath.Join(dir, "initrd"), filepath.Join(dir, "console"), filepath.Join(dir, "report")
	must(t, os.WriteFile(initrd, ramDisk(t, tools), 0o600))
	ctx, cancel := contextWithTimeout(t, bootTimeout)
	defer cancel()
	// One thread: others would only wait for each other on a busy machine. Time in the guest
	// goes on by what it does, 8 ns for an instruction, so that no time limit of its
	// programs and units is one of how busy the machine is; when it idles, time jumps.
	qemu := exec.CommandContext(ctx, tools.Qemu, "-accel", "tcg,thread=single", "-icount", "shift=3,sleep=off", "-rtc", "clock=vm", "-cpu", "max",
		"-m", "1024", "-nodefaults", "-nographic", "-no-reboot",
		"-serial", "file:"+console, "-serial", "file:"+report,
		"-kernel", filepath.Join(tools.GuestKernel, "vmlinuz"), "-initrd", initrd,
		// oops and the end of init end the guest.
		"-append", "console=ttyS0 rdinit=/lib/systemd/systemd panic=-1 oops=panic quiet mitigations=off random.trust_cpu=on")
	out, err := qemu.CombinedOutput()
	text, _ := os.ReadFile(report)
	if err == nil {
		err = json.Unmarshal(bytes.TrimSpace(text), &r)
	}
	if err != nil {
		said, _ := os.ReadFile(console)
		t.Fatalf("guest: %v: %s\nreport: %s\nconsole: %s", err, out, text, said)
	}
	if r.Fault != "" {
		said, _ := os.ReadFile(console)
		t.Logf("console: %s", said)
	}
	return r
}

// ramDisk is all that there is in the guest.
func ramDisk(t *testing.T, tools kit.Tools) []byte {
	t.Helper()
	d := newArchive()
	bin := kit.Binaries(t, programs...)
	for _, name := range programs {
		d.copy(t, filepath.Join(bin, name), guest.Bin+"/"+name)
	}
	d.copy(t, buildInit(t), guest.Init)
	d.link(guest.Stand, guest.Init)
	d.link(guest.Engine, guest.Init)
	d.program(t, tools.Nydusd, guest.Nydusd)
	d.copy(t, filepath.Join(tools.GuestKernel, "overlay.ko.xz"), guest.Module)
	addSystemd(t, d)
	for n, name := range []string{guest.Limited, guest.Other} {
		addImage(t, d, name, uint64(n))
	}
	return d.end(t)
}

func buildInit(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "init")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, "./init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the guest's init: %v: %s", err, out)
	}
	return path
}

// addImage puts an image of some random files into the RAM disk.
func addImage(t *testing.T, d *archive, name string, seed uint64) {
	t.Helper()
	random := rand.NewChaCha8([32]byte{byte(seed + 1)})
	files, tarball := guest.Image{Files: map[string]string{}}, []kit.File{{Name: "./"}, {Name: "dir/"}}
	for n := range 12 {
		data := make([]byte, 40_000*(n+1))
		_, _ = random.Read(data)
		path := fmt.Sprintf("dir/file%d", n)
		sum := sha256.Sum256(data)
		files.Files[path] = hex.EncodeToString(sum[:])
		tarball = append(tarball, kit.File{Name: path, Data: string(data)})
	}
	img := kit.MustBuildImage(t, kit.Pause, kit.FileLayer(tarball...)).MustNydus(t, kit.NydusOptions{ChunkSize: "0x10000"})
	boot, err := img.BootstrapBytes()
	must(t, err)
	list, err := json.Marshal(files)
	must(t, err)
	dir := guest.Images + "/" + name
	d.add(dir+"/bootstrap", 0o644, boot)
	d.add(dir+"/files.json", 0o644, list)
	for n, l := range img.Layers {
		if n != img.Bootstrap() {
			d.copy(t, l.Path, dir+"/blobs/"+l.Desc.Digest.Encoded())
		}
	}
}
