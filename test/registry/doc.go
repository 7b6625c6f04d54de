// Package registry tests how blobs are read from real servers: docker-registry behind
// every kind of lock, fault proxies before it, a real nydusd at the other end, and the
// gateway between them. Everything is local and ends with its test; the tests need root
// (see kit.Main) and `make tools build`.
//
// There is no real token server among the servers: the lab has its own, which speaks
// docker's protocol and signs tokens that docker-registry accepts. docker-registry takes
// a token for a minute after its end, so that the lab's proxy refuses those in its place.
//
// FAULTS_TIME is how long TestRandomFaults goes on, SEED which faults it makes.
package registry
