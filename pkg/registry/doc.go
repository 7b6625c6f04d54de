// Package registry turns an image reference into the place where the image's
// blobs are, and finds the credentials that open it.
//
// What the package promises:
//
//   - References are read with the parser that the whole field uses, so that a
//     host or repository here is the one that the image was pulled from.
//   - Credentials appear in nothing but the value that is returned: not in
//     errors, not in logs, not in argument lists or the environment.
//   - A lookup ends with its context, also when a credential helper hangs.
//
// It opens no connection. Do not use it to fetch anything: nydusd does that.
package registry
