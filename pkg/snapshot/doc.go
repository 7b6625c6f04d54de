// Package snapshot is containerd's Snapshotter for nydus images. It wraps
// containerd's own overlay snapshotter, so that layers, database, usage and
// plain OCI images are exactly what they are with overlayfs, and adds what a
// nydus image needs.
//
// What the package promises:
//
//   - It starts, mounts and unmounts nothing. Prepare, View and Mounts answer
//     from the database and the layers' records; whoever performs the mount
//     makes the image's filesystem exist.
//   - The mounts of a snapshot without a nydus layer below it are overlayfs's,
//     to the letter.
//   - A nydus layer is one only while containerd unpacks an image, and by a
//     record that is written then. Labels on a container's snapshot, which a pod
//     can choose, select nothing.
//   - Credentials in labels are ignored, which is said, and not kept.
//   - With Options.Signatures no mount of an image is handed out, and no bootstrap
//     committed, that is not signed.
//   - A bootstrap is opened beneath its layer without following links, must be a
//     regular file of bounded size, and is read before the layer is committed:
//     a hostile image fails to be pulled, not to be mounted.
//   - A process that is killed between any two instructions leaves at most an
//     active snapshot, which containerd's garbage collection removes.
//
// Do not use it without a containerd above it: names are unique and parents
// exist because containerd's metadata store sees to it.
//
// # Layers
//
// A data layer (label containerd.io/snapshot/nydus-blob) is committed empty as
// soon as it is prepared, which is answered by ErrAlreadyExists: containerd then
// does not download it. A bootstrap layer (…/nydus-bootstrap) is unpacked by
// containerd. Both must carry the image reference (…/cri.image-ref), because it
// says where the blobs are.
//
// Layers may lie above the bootstrap, as in an image that was committed from a
// container. containerd applies such a layer to the upper directory alone, so
// that an unpack is given overlayfs's mounts even there; a directory that the
// layer does not itself describe then gets mode 0755 instead of a copy of the
// image's.
//
// # Record
//
// Each nydus layer has, beside its directory fs, a file layer.json: version (1),
// kind (data or bootstrap), image (the reference), backend (that the labels ask for), for
// data blob (its id, when containerd tells), and for a bootstrap path
// (within fs), digest (sha256:…), size in bytes, fs_version (v5 or v6) and blobs
// (ids). A snapshot directory without it is a plain layer or a container's.
package snapshot
