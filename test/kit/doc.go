// Package kit is what end-to-end tests, the demo and the benchmark stand on:
// real containerd, real registry, real images, and a check that nothing is left.
//
// A package of tests begins with
//
//	func TestMain(m *testing.M) { kit.Main(m) }
//
// which runs them as root in a process and mount namespace of their own (see
// Enter): default paths such as /run/nydus-snapshotter and /etc/nydus-snapshotter
// can be used, and the machine's own containerd, mounts and files stay untouched.
// Programs that are no tests use Enter and RunTB.
//
// A test then reads
//
//	r := kit.NewRegistry(t, kit.RegistryOptions{User: "u", Password: "p"})
//	plain, nydus := kit.MainImage(t, kit.NydusOptions{})
//	ref := r.MustPush(t, nydus, "main:nydus")
//	n := kit.NewNode(t, kit.NodeConfig{Snapshotter: true})
//	img := n.MustPull(t, ref, kit.PullOptions{User: "u", Password: "p"})
//	c := n.MustRun(t, img, "one", kit.RunOptions{})
//	want, err := plain.Tree()
//	kit.EqualTrees(t, "the container's view", want, kit.MustWalk(t, c.Root()))
//
// The parts:
//
//   - Tools: where `make tools` put nydusd, containerd 2.4 and 1.6, runc, the
//     registry. What is missing fails the test with what to do about it.
//   - Baseline: mounts, processes, sockets and run-directory entries at the end
//     equal those at the start. NewNode, NewRegistry and MountBare call it.
//   - Registry: docker-registry behind a proxy that records requests, counts
//     blob bytes, and lets a Hook deny, delay or alter answers.
//   - Image: MainImage, SmallImage, BuildImage for plain images, Nydus to convert
//     one, Hostile and RenameBlob for what no converter makes.
//   - Node: a private containerd of either version with the snapshotter, through
//     the client (Pull, Run), ctr (Ctr) or CRI (CRIPull, RunPod).
//   - Tree: what a mount shows, compared with what the layers say.
//
// It promises that nothing outlives the test program, even one that is killed,
// that no function waits by sleeping, and that whatever fails says why. Do not use
// it from tests that need no root: they stay with their package. Tests that use
// it do not run in parallel within one program; programs do.
package kit
