// Package signature tells whether the bootstrap of a nydus image was signed with a key that
// the operator trusts.
//
// The scheme is that of containerd/nydus-snapshotter (pkg/signature, pkg/utils/signer and
// pkg/label there, v0.16.1), so that what was signed for it is accepted here: the signature
// is RSA PKCS #1 v1.5 (RFC 8017, section 8.2) over the SHA-256 of the bootstrap's bytes, in
// standard base64 with padding, and stands in the annotation [Label] of the bootstrap
// layer's descriptor, of which containerd makes a label of the layer's snapshot. That is
//
//	openssl dgst -sha256 -sign key.pem image.boot | base64 -w0
//
// What the package promises:
//
//   - What is not signed, wrongly signed, or cannot be judged, is an error. Nothing is let
//     through because a file could not be read.
//   - The bootstrap is judged by its SHA-256, which is what the signature is over. So it
//     costs no read of the bootstrap, some ten microseconds of a processor, and there is
//     no verdict that could be out of date. Whoever opens the bootstrap has to compare the
//     digest, as the mount helper does.
//   - The file with the keys counts as it is now: a key that is added or removed counts
//     from the next call on. A file that was good and is broken now lets nothing through.
//   - Errors name the setting, the file and the label, and never what is in the file.
//
// A signature is public, and says for itself which bytes it is for. So it does not matter
// who brings it, and it can be taken from a label that others may set: at worst a good one
// is hidden, and the image refused.
//
// Do not use it to decide what an image is called or whether it is the newest: neither name
// nor tag is signed, nor the image's configuration, nor layers above the bootstrap's.
package signature
