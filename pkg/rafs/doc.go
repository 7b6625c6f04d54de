// Package rafs reads the head of a nydus bootstrap: which version of RAFS it
// is, which blobs the image consists of, and how those are cut into chunks. With
// [Chunks] it also lists each blob's chunks and their digests.
//
// What the package promises:
//
//   - A bootstrap is hostile until read: no input makes [Open] panic, read
//     outside the given size, or hold more than a few megabytes. [Chunks] holds 56
//     bytes for each chunk, and no more chunks than its caller allows.
//   - Every blob id that it returns is 64 lowercase hex digits, so it can name a
//     file or a path of a URL. nydusd itself does not check that, and would
//     write wherever an id such as "../x" leads.
//   - A bootstrap that nydusd and the kernel could read differently (two
//     superblocks, device slots unlike the blob table) is refused.
//   - Only the standard library is linked, so the mount path stays light.
//
// It reads of inodes only where their chunks are, and does not prove that the filesystem is sound;
// nydusd and the kernel do that. [OpenFile] and [ReadFile] see to it that a file is a regular
// one; that it lies at the expected place is up to whoever opens it.
//
// # On-disk format
//
// All numbers are little endian.
//
// RAFS v6 is an EROFS image. Its superblock of 128 bytes lies at 1024: magic
// 0xE0F5E1E2 at +0, block size as a power of two (always 12) at +12, the number
// of further devices as u16 at +86, and where their slots begin as u16 at +88 in
// units of 128 bytes. A device slot begins with a tag of 64 bytes, the blob id,
// followed by the number of 4 KiB blocks as u32.
//
// The RAFS extension of 256 bytes follows at 1152: flags u64 at +0, blob table
// offset u64 at +8 and size u32 at +16, chunk size u32 at +20, chunk table offset
// u64 at +24 and size u64 at +32. An entry of the blob table has 256 bytes: id
// [64] at 0, index u32 at 64, chunk size u32 at 68, number of chunks u32 at 72,
// compressor u32 at 76, digester u32 at 80, features u32 at 84, compressed size
// u64 at 88, uncompressed size u64 at 96; for blobs whose metadata lies in a blob
// of its own, that blob's sha256 [32] at 168 and its size u64 at 200.
//
// Of the blob's own metadata an entry has: size of its table of contents u32 at 104 and
// sha256 [32] at 136, both 0 when unknown; of its list of chunks the compressor u32 at 108,
// offset u64 at 112, compressed size u64 at 120 and size u64 at 128. There is no digest of
// that list.
//
// The chunk table is an array without gaps. An entry has 80 bytes, in v5 and v6: digest
// [32] of the uncompressed data at 0, index of the blob u32 at 32, flags u32 at 36
// (compressed 1, hole 2, encrypted 4, part of a batch 8, with a CRC 16), size u32 at 40,
// uncompressed size u32 at 44, offset in the blob u64 at 48, uncompressed offset u64 at 56,
// offset in a file u64 at 64, index in the blob's list u32 at 72, CRC u32 at 76.
//
// RAFS v5 has a superblock of 8192 bytes at 0: magic 0x52414653 at 0, version
// 0x500 at 4, superblock size at 8, chunk size u32 at 12, flags u64 at 16, blob
// table offset u64 at 48 and size in bytes u32 at 64, and since 2021 an extended
// blob table: number of entries u32 at 68, offset u64 at 72. A blob table entry is
// two u32 (what to read ahead) and the id, with a NUL between entries and up to
// seven behind the last. An extended entry has 64 bytes: number of chunks u32,
// features u32, uncompressed size u64, compressed size u64. Compressor and
// digester are the same for all blobs, in the superblock's flags.
//
// Its inode table (offset u64 at 32, number of entries u32 at 56) has a u32 for each inode:
// where that lies, in units of 8 bytes, or 0. An inode has 128 bytes: mode u32 at 60, flags
// u64 at 80 (4: it has extended attributes), number of chunks u32 at 96 for a file, sizes of
// the name u16 at 100 and of a link's target u16 at 102. Behind it lie both of these, then
// the attributes' size u64 and the attributes, each padded to 8 bytes, then the chunks.
package rafs
