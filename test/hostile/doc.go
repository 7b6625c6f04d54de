// Package hostile holds the tests of what happens when something is wrong or
// against us, on real parts: images that were made to harm, registries that
// answer with other bytes, labels that a pod chose, missing and broken programs,
// and a password that must show nowhere.
//
// It has nothing to import. Tests of normal operation are in package e2e, those
// of the mount helper alone in package mount.
package hostile
