// Package credentials finds what opens a registry in several places, one after the
// other: a Chain of Providers, which is a registry.Keychain.
//
// What the package promises:
//
//   - The first provider that knows something wins. One that fails does not keep the
//     others from being asked; its failure is told, with its name, only when none
//     knows anything.
//   - A source is not asked for each request: a Memo keeps answers as long as they
//     may be kept, renews them before they end, and lets one lookup run at a time.
//     That there is nothing, and that a source fails, is kept too, for seconds.
//   - What a registry refuses is passed over while there is something else, and is
//     forgotten, so that its source is asked again; not for each request.
//   - Secrets are in memory only, as many as a bound says, and in no text: not in
//     errors, not in logs.
//
// The sources themselves, which have dependencies of their own, are packages beneath
// this one; docker's configuration is in package registry.
//
// Do not use it for credentials that may not be shared: who asks for a repository
// gets what opens it, whoever brought that.
package credentials
