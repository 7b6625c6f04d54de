// Package mountspec is the contract between the snapshotter, which decides how
// an image is to be mounted, and whoever performs that mount: the mount helper,
// the runtime hook, a VM shim. It turns a [Spec] into the text of one mount
// option and back.
//
// The option is `extraoption=` followed by standard, padded base64 of a JSON
// object. Kata Containers reads four strings of that object (source, config,
// snapshotdir, fs_version) and ignores the rest; everything of ours lies in one
// further member, "nydus".
//
// What the package promises:
//
//   - Every member, Kata's included, is authenticated: an option that was
//     changed, cut or put together from two others is refused by [Decode].
//   - Credentials are sealed (AES-256-GCM) with a key that only root on this
//     node can read, and bound to everything else in the option: host,
//     repository, bootstrap digest, instance. They never show in the clear.
//   - An option made by a newer version is refused by its version number, not by
//     an accidental parse error.
//   - Only the standard library is linked, so the mount path stays light.
//
// Do not use it to hand configuration to anything that does not share the
// node's key, nor as a store: the key lives until the next boot.
package mountspec
