// Package gateway serves blobs to nydusd from wherever a registry's configuration
// says: it is an HTTP server for this machine, at which nydusd is pointed instead of
// at the registry, and does for each request what nydusd cannot (other hosts in order,
// client certificates, tokens that expire).
//
// What it promises:
//
//   - A request opens the blobs of one image only, with the capability that was made
//     for it, as long as the image's instance lives. Whatever else is asked for is
//     refused and logged. The capability comes as the registry's token, so that it is
//     in no path: nydusd logs those.
//   - It holds nothing that its end would lose: a request that is asked again works
//     with the next gateway. Nothing of a blob is kept, and parts of it are passed on
//     as they come.
//   - An answer that was begun and cannot be completed ends with its connection, so
//     that a part is never taken for the whole.
//
// It serves whoever reaches its address: that has to be a loopback one. Do not use it
// as a registry: it knows no manifests, and nothing but reading.
package gateway
