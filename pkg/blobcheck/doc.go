// Package blobcheck compares parts of a blob with what the image's bootstrap says of
// them, while they are passed on.
//
// nydusd checks the digests of what it fetches in few configurations only, so that a
// registry's mirror with a broken disk would be believed. Its requests are whole
// chunks, and the bootstrap has the digest of each.
//
// What the package promises:
//
//   - The last bytes of a part are held back until everything in it has been checked:
//     what is wrong ends in [ErrContent] before the part is complete, and nydusd takes
//     a body that ends early for an error, not for data.
//   - Checking runs beside the passing on: of a good part only the last chunk is
//     waited for.
//   - Memory is bounded: a [Reader] holds at most what has arrived of a compressed chunk,
//     and a [Pool], once for each of its workers, a chunk that is being checked. Chunks that
//     are not compressed are not held.
//   - What cannot be checked is counted: see [Reader.Unchecked].
//
// A chunk is checked by its uncompressed digest. The blob's own list of chunks
// (blob.meta), for which no bootstrap has a digest, is compared with the bootstrap's
// entry by entry: nydusd believes that list, and with a wrong one it would put right
// chunks into wrong places. The table of contents is compared with its digest when the
// bootstrap has one; no wrong one makes nydusd take wrong data for right.
//
// # What it cannot check
//
//   - Chunks of the blob that the bootstrap does not know, because a layer above hides or
//     removes their files. nydusd caches them all the same when they lie between others.
//     No file of this image shows them, but one of another image may that shares the
//     cache.
//   - Chunks and metadata of blobs that are OCI layers themselves (zran), of batch and
//     encrypted blobs, and what is compressed with gzip.
//   - Tar headers, the blob's own digests of chunks, and the metadata's padding. A wrong
//     digest there makes nydusd refuse right data, never take wrong data.
//   - A part that was wrong on its way and decodes to the same chunk: it is right for
//     all purposes.
//
// Do not use it on a whole blob that is to be kept: its sha256 is its name.
package blobcheck
