// Package cri sees the credentials with which kubelet pulls images. It stands between
// kubelet and containerd's CRI as an image service, passes every call on, and keeps
// what PullImage brings for the repository that it is for.
//
// What the package promises:
//
//   - Calls pass unchanged, those too that this package does not know: messages,
//     metadata, streams, errors with their details. It serves whatever CRI serves at
//     the socket behind it; kubelet sends image calls alone to its
//     imageServiceEndpoint.
//   - Credentials are known before the pull goes on, since containerd's snapshotter
//     may be asked for mounts within it. When a registry refuses them, they are
//     forgotten; if an image was pulled with them, they come after the others first.
//   - They are meant for the host that containerd would send them to, as its ParseAuth
//     decides, and for the image's repository; not for its mirrors.
//   - They are kept in a Store: files of mode 0600 on a tmpfs, which other processes
//     can read and which outlive this one, but not the boot. Their names tell nothing;
//     their number and their size are bounded, and what was never proven goes first.
//
// Formats: k8s.io/cri-api, runtime.v1.ImageService.
package cri
