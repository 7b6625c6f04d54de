// Package fetch completes images in the cache: it has nydusd fetch what is missing, and
// has what is there compared with the image's digests, so that the next start of the image
// needs no daemon.
//
// What the package promises:
//
//   - It asks for nothing that the cache has: progress is nydusd's presence maps, and a run
//     that was interrupted, or killed, is continued by the next one.
//   - nydusd gives up on what it cannot fetch without a word. So a daemon that does nothing
//     any more is replaced by another one, and when several in a row get nothing the error
//     says which blobs lack what, and what the last of them has said.
//   - On average no more is fetched than the rate allows.
//   - No daemon is left when a call returns, whatever it returns, and none that was started
//     when what is in the cache cannot be right.
//   - Wrong data is never taken for right: what is complete is compared (package prove).
//
// It starts nothing by itself: a [Fetcher] is given what starts a daemon, for which
// pkg/instance has Hold. Do not use it to learn whether an image is complete (package
// chunkmap) or proven (package proof), nor with a nydusd older than 2.3, whose cache is of
// no use to anybody else.
package fetch
