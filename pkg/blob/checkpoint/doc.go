// Package checkpoint keeps, beside what nydusd says is in its cache, what is known to be
// on the disk too, so that a power cut costs what was fetched last and nothing else.
//
// nydusd sets a chunk's bit in the blob's map once it has written the chunk, and syncs
// neither. The kernel may write the map first: after a power cut, or a crash of the
// kernel, bits may stand over holes, for which nydusd serves zeros. The same holds for the
// blob's metadata, of which nydusd looks at the last page alone. So none of it is believed
// in a new boot but what a checkpoint vouches for.
//
// What the package promises:
//
//   - [Take] writes down which chunks are there, after their data was synced: first the
//     map is read, then the data is synced, then the checkpoint is written under another
//     name, synced and renamed. Killed or cut off anywhere, the former one stays.
//   - [Restore] takes from each map what no checkpoint vouches for, and removes metadata
//     that is not what it was when it was synced. What is removed is fetched again on demand.
//   - Restore takes nothing from a daemon that runs: maps are replaced and removed by name,
//     never written to, and data is not touched at all. A daemon that has them open goes on
//     with what it has.
//   - Neither reads data: both take some small reads for each blob.
//   - Where there is no room to write a shorter map, it is removed as a whole.
//   - When data cannot be synced, what was fetched since the last checkpoint is not
//     believed any more: the kernel reports such an error once, and a later sync succeeds
//     although the data is lost.
//   - It is linked by the mount helper, so it links the standard library, golang.org/x/sys,
//     and small packages of ours alone.
//
// Restore is to be called once in each boot, before a daemon of that boot begins, and Take
// only after it: pkg/instance (TrustCache) sees to both. Whoever takes checkpoints keeps
// others from removing blobs meanwhile; whoever removes a blob removes its checkpoints with
// its maps, before its data.
//
// It does not find data that a disk has lost or changed later: compare it with the digests
// for that.
//
// # On-disk format
//
// The checkpoint of a map lies beside it, with [Suffix] behind its name, and is JSON: see
// record. It counts only for the data file that it names by inode and size.
package checkpoint
