// Package registry turns an image reference into the place where the image's
// blobs are, finds the credentials that open it, and reads parts of blobs.
//
// What the package promises:
//
//   - References are read with the parser that the whole field uses, so that a
//     host or repository here is the one that the image was pulled from.
//   - Credentials appear in nothing but the value that is returned: not in
//     errors, not in logs, not in argument lists or the environment.
//   - A lookup ends with its context, also when a credential helper hangs.
//   - Hosts are those of containerd's hosts.toml, read by containerd's own package:
//     see Endpoints. What is meant for one of them is not sent to another.
//   - A part of a blob comes whole or not at all, from whichever host gives it out:
//     see Fetcher. Its bytes are not checked against digests.
//
// Do not use it to pull images: containerd does that.
package registry
