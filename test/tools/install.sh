#!/usr/bin/env bash
# Installs the real parts that tests, demo and benchmark run against.
#
#   install.sh              install what is missing, write the env file
#   install.sh lint         install golangci-lint only, print its path
#   install.sh --print-env  print the env file of an earlier run
#
# Everything goes into a cache folder outside the checkout, one directory per
# tool and version: NYDUS_TOOLS, or $XDG_CACHE_HOME/nydus-tools, or
# ~/.cache/nydus-tools. A directory appears there by rename when it is complete,
# so a run that is killed leaves nothing half-made, and a second run builds
# nothing. Runs at the same time wait for each other. Nothing is installed onto
# the machine itself except Debian's fuse3, qemu-system-x86 and systemd where they
# are missing: the Debian packages of containerd and docker-registry would start
# services.
set -euo pipefail

nydus_version=2.2.0
nydusd_version=2.4.0 # of test/nydusd
containerd_version=2.4.2
runc_version=1.5.2
golangci_version=2.15.0
guest_series=6.12 # of Debian's kernel for the guest in test/guest

# Debian packages whose files make up the image fixture (see test/kit).
fixture_packages=(
	base-files netbase busybox-static libc6 libgcc-s1 gcc-12-base
	coreutils bash dash sed grep gawk findutils tar gzip
	libacl1 libattr1 libselinux1 libpcre2-8-0 libtinfo6 libgmp10 libmpfr6
	libsigsegv2 libreadline8 readline-common
	python3-minimal python3.11-minimal libpython3.11-minimal
	libpython3.11-stdlib libexpat1 zlib1g libssl3 libbz2-1.0 liblzma5
	libffi8 libsqlite3-0 libuuid1 libcrypt1 libncursesw6 libdb5.3 libnsl2
	libtirpc3 media-types
	perl-base perl-modules-5.36 git libcurl3-gnutls libicu72 libstdc++6
	libxml2 libllvm14 tzdata iso-codes
)

export HOME="${HOME:-/root}" # not set in a service
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${NYDUS_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/nydus-tools}

say() { printf 'tools: %s\n' "$*" >&2; }
die() {
	say "error: $*"
	exit 1
}

# need PROGRAM REASON
need() {
	command -v "$1" >/dev/null 2>&1 || die "$1 is not in PATH: $2"
}

# preflight installs what Debian has of what this machine lacks, and reports the
# rest at once, before anything is built. Debian 12's own Go and Rust are too old.
preflight() {
	local missing= packages=
	command -v cc >/dev/null 2>&1 || packages="gcc libc6-dev"
	command -v perl >/dev/null 2>&1 || packages="$packages perl"
	command -v make >/dev/null 2>&1 || packages="$packages make"
	if [ -n "$packages" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
		say "installing Debian's ${packages# }"
		apt_update || true
		# shellcheck disable=SC2086 # a list
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >&2 || true
	fi
	command -v perl >/dev/null 2>&1 || missing="$missing; perl (apt-get install perl), to build OpenSSL"
	command -v go >/dev/null 2>&1 || missing="$missing; Go 1.26 or newer (https://go.dev/dl)"
	command -v cargo >/dev/null 2>&1 || missing="$missing; Rust with cargo (https://rustup.rs), to build nydusd"
	command -v cc >/dev/null 2>&1 || missing="$missing; a C compiler (apt-get install gcc libc6-dev)"
	command -v flock >/dev/null 2>&1 || missing="$missing; flock (apt-get install util-linux)"
	[ -z "$missing" ] || die "not in PATH: ${missing#; }"
}

# version_at_least HAVE WANT
version_at_least() {
	[ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n1)" = "$2" ]
}

# fresh NAME prints a new empty directory beside the final ones.
fresh() {
	mkdir -p "$cache/.tmp"
	mktemp -d "$cache/.tmp/$1.XXXXXX"
}

# publish TEMP FINAL makes a finished directory visible in one step.
publish() {
	chmod 0755 "$1"
	sync -f "$1" 2>/dev/null || true
	rm -rf "$2"
	mv -T "$1" "$2"
}

apt_updated=
# apt_update refreshes the package lists once per run.
apt_update() {
	[ -z "$apt_updated" ] || return 1
	need apt-get "Debian packages are needed here; run this on Debian 12"
	say "apt-get update"
	apt-get update -qq >&2 || die "apt-get update failed: is Debian's package registry reachable?"
	apt_updated=yes
}

# apt_download DIR PACKAGE... fetches .deb files without installing them.
apt_download() {
	local dir=$1
	shift
	need apt-get "Debian packages are needed here; run this on Debian 12"
	need dpkg-deb "it unpacks Debian packages (package dpkg)"
	# An index that is older than the archive names files that are gone.
	if ! (cd "$dir" && apt-get download -qq -o APT::Sandbox::User=root "$@" >&2 2>apt.log); then
		apt_update || true
		(cd "$dir" && apt-get download -qq -o APT::Sandbox::User=root "$@" >&2) ||
			die "apt-get download $* failed: see the message above"
	fi
	rm -f "$dir/apt.log"
}

emit() { printf '%s=%s\n' "$1" "$2" >>"$env_tmp"; }

# go_install DIR TAGS CGO MODULE@VERSION...
go_install() {
	local dir=$1 tags=$2 cgo=$3
	shift 3
	need go "install Go 1.26 or newer"
	mkdir -p "$dir/bin"
	(cd / && GOBIN="$dir/bin" GOFLAGS="-trimpath -buildvcs=false" CGO_ENABLED=$cgo \
		go install -tags "$tags" "$@") >&2 ||
		die "go install $* failed: see the compiler's message above"
}

# install_nydus builds the oldest supported nydusd, and nydus-image, whose version
# the fixtures depend on.
install_nydus() {
	local dir=$cache/nydus-rs-$nydus_version
	if [ ! -x "$dir/bin/nydusd" ] || [ ! -x "$dir/bin/nydus-image" ]; then
		need cargo "install Rust (cargo builds nydusd)"
		need cc "a C compiler is needed to build nydusd (package gcc)"
		say "building nydusd and nydus-image $nydus_version, about 4 minutes"
		local tmp
		tmp=$(fresh nydus)
		cargo install nydus-rs --version "$nydus_version" --locked --features virtiofs \
			--root "$tmp" --target-dir "$tmp/target" >&2 ||
			die "cargo install nydus-rs $nydus_version failed: see the compiler's message above"
		rm -rf "$tmp/target"
		publish "$tmp" "$dir"
	fi
	emit NYDUSD_OLD "$dir/bin/nydusd"
	emit NYDUS_IMAGE "$dir/bin/nydus-image"
}

# install_nydusd finds or builds the nydusd that users run: the one in PATH when
# it is as new, else the front end in test/nydusd.
install_nydusd() {
	local have key dir src=$here/../nydusd
	if command -v nydusd >/dev/null; then
		have=$(nydusd --version 2>/dev/null | sed -n 's/.*[vV]ersion:*[[:space:]]*v*\([0-9][0-9.]*\).*/\1/p' | head -n1 || true)
		if [ -n "$have" ] && version_at_least "$have" "$nydusd_version"; then
			say "nydusd $have from PATH"
			emit NYDUSD "$(command -v nydusd)"
			return
		fi
	fi
	key=$(cd "$src" && find Cargo.toml Cargo.lock src -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-12)
	dir=$cache/nydusd-$nydusd_version-$key
	if [ ! -x "$dir/bin/nydusd" ]; then
		need cargo "install Rust (cargo builds nydusd)"
		need perl "OpenSSL's build needs it (apt-get install perl)"
		say "building nydusd $nydusd_version from test/nydusd, about 4 minutes"
		local tmp
		tmp=$(fresh nydusd)
		cargo install --path "$src" --locked --root "$tmp" --target-dir "$tmp/target" >&2 ||
			die "cargo install of test/nydusd failed: see the compiler's message above"
		rm -rf "$tmp/target"
		publish "$tmp" "$dir"
	fi
	emit NYDUSD "$dir/bin/nydusd"
}

install_containerd() {
	local found dir=$cache/containerd-$containerd_version
	found=$(command -v containerd || true)
	if [ -n "$found" ] && "$found" --version 2>/dev/null | grep -q ' v*2\.4\.' &&
		[ -x "$(dirname "$found")/ctr" ] && [ -x "$(dirname "$found")/containerd-shim-runc-v2" ]; then
		say "containerd 2.4 from PATH"
		emit CONTAINERD_BIN "$(dirname "$found")"
		return
	fi
	if [ ! -x "$dir/bin/containerd" ]; then
		say "building containerd $containerd_version, about 2 minutes"
		local tmp m=github.com/containerd/containerd/v2/cmd
		tmp=$(fresh containerd)
		go_install "$tmp" "no_btrfs no_devmapper no_zfs netgo osusergo" 0 \
			$m/containerd@v$containerd_version $m/ctr@v$containerd_version \
			$m/containerd-shim-runc-v2@v$containerd_version
		publish "$tmp" "$dir"
	fi
	emit CONTAINERD_BIN "$dir/bin"
}

install_runc() {
	local found dir=$cache/runc-$runc_version
	found=$(command -v runc || true)
	if [ -n "$found" ] && "$found" --version 2>/dev/null | grep -q '^runc version 1\.5\.'; then
		say "runc 1.5 from PATH"
		emit RUNC "$found"
		return
	fi
	if [ ! -x "$dir/bin/runc" ]; then
		need cc "a C compiler is needed to build runc (package gcc)"
		say "building runc $runc_version"
		local tmp
		tmp=$(fresh runc)
		# Without the seccomp tag no C library beside libc is needed.
		go_install "$tmp" "netgo osusergo" 1 github.com/opencontainers/runc@v$runc_version
		publish "$tmp" "$dir"
	fi
	emit RUNC "$dir/bin/runc"
}

# unpack_deb PACKAGE DIRECTORY-PREFIX PROBE sets $unpacked to a directory
# prefix-VERSION that holds the package's files, of whatever version is there.
unpack_deb() {
	local dir tmp deb
	for dir in "$cache/$2"-*; do
		if [ -x "$dir/$3" ]; then
			unpacked=$dir
			return
		fi
	done
	say "unpacking Debian's $1"
	tmp=$(fresh "$2")
	apt_download "$tmp" "$1"
	deb=$(echo "$tmp/$1"_*.deb)
	dir=$cache/$2-$(dpkg-deb -f "$deb" Version | tr ':~+' '---')
	mkdir "$tmp/root"
	dpkg-deb -x "$deb" "$tmp/root" || die "dpkg-deb -x $deb failed: see the message above"
	[ -x "$tmp/root/$3" ] || die "Debian's $1 has no /$3"
	publish "$tmp/root" "$dir"
	rm -rf "$tmp"
	unpacked=$dir
}

install_containerd16() {
	local found
	found=$(command -v containerd || true)
	if [ -n "$found" ] && "$found" --version 2>/dev/null | grep -q ' v*1\.6\.' &&
		[ -x "$(dirname "$found")/containerd-shim-runc-v2" ]; then
		say "containerd 1.6 from PATH"
		emit CONTAINERD16_BIN "$(dirname "$found")"
		return
	fi
	unpack_deb containerd containerd16 usr/bin/containerd
	"$unpacked/usr/bin/containerd" --version 2>/dev/null | grep -q ' v*1\.6\.' ||
		die "Debian's containerd is not 1.6: $("$unpacked/usr/bin/containerd" --version 2>&1); Debian 12 has it"
	emit CONTAINERD16_BIN "$unpacked/usr/bin"
}

install_registry() {
	if command -v docker-registry >/dev/null; then
		emit REGISTRY "$(command -v docker-registry)"
		return
	fi
	unpack_deb docker-registry docker-registry usr/bin/docker-registry
	emit REGISTRY "$unpacked/usr/bin/docker-registry"
}

find_mount_fuse() {
	mount_fuse=$(PATH=$PATH:/usr/sbin:/sbin command -v mount.fuse3 || PATH=$PATH:/usr/sbin:/sbin command -v mount.fuse || true)
}

install_fuse() {
	find_mount_fuse
	if [ -z "$mount_fuse" ]; then
		[ "$(id -u)" = 0 ] || die "mount.fuse3 is missing and only root can install it: apt-get install fuse3"
		say "installing Debian's fuse3"
		need apt-get "mount.fuse3 is missing; install fuse3"
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends fuse3 >&2 ||
			{ apt_update && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends fuse3 >&2; } ||
			die "apt-get install fuse3 failed: see the message above"
		find_mount_fuse
		[ -n "$mount_fuse" ] || die "fuse3 is installed, yet neither mount.fuse3 nor mount.fuse is in PATH"
	fi
	emit MOUNT_FUSE "$mount_fuse"
}

# apt_install PROGRAM PACKAGE installs a Debian package where PROGRAM is missing.
apt_install() {
	[ ! -x "$1" ] && ! command -v "$1" >/dev/null || return 0
	[ "$(id -u)" = 0 ] || die "$1 is missing and only root can install it: apt-get install $2"
	need apt-get "$1 is missing; install it (Debian: $2)"
	say "installing Debian's $2"
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2" >&2 ||
		{ apt_update && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2" >&2; } ||
		die "apt-get install $2 failed: see the message above"
}

# install_guest gets what runs the guest of test/guest: an emulator, which needs no
# help of the processor's, systemd, and a kernel with the one module that is not
# built in.
install_guest() {
	local dir tmp deb package module
	apt_install qemu-system-x86_64 qemu-system-x86
	apt_install /lib/systemd/systemd systemd
	emit QEMU "$(command -v qemu-system-x86_64)"
	for dir in "$cache/guest-kernel-$guest_series".*; do
		if [ -f "$dir/vmlinuz" ] && [ -f "$dir/overlay.ko.xz" ]; then
			emit GUEST_KERNEL "$dir"
			return
		fi
	done
	# The package that is always there only depends on the newest kernel of the series.
	package=$(apt_depends "linux-image-$guest_series-cloud-amd64")
	if [ -z "$package" ]; then
		apt_update || true
		package=$(apt_depends "linux-image-$guest_series-cloud-amd64")
	fi
	[ -n "$package" ] || die "Debian has no linux-image-$guest_series-cloud-amd64: Debian 12 has it"
	say "unpacking Debian's $package"
	tmp=$(fresh kernel)
	apt_download "$tmp" "$package"
	deb=$(echo "$tmp/$package"_*.deb)
	dir=$cache/guest-kernel-$(dpkg-deb -f "$deb" Version | tr ':~+' '---')
	mkdir "$tmp/root" "$tmp/out"
	dpkg-deb -x "$deb" "$tmp/root" || die "dpkg-deb -x $deb failed: see the message above"
	module=$(find "$tmp/root" -name overlay.ko.xz)
	{ cp "$tmp"/root/boot/vmlinuz-* "$tmp/out/vmlinuz" && cp "$module" "$tmp/out/overlay.ko.xz"; } ||
		die "$package has not the files that the guest needs: see the message above"
	publish "$tmp/out" "$dir"
	rm -rf "$tmp"
	emit GUEST_KERNEL "$dir"
}

# apt_depends PACKAGE prints the first package that it depends on.
apt_depends() {
	need apt-cache "Debian packages are needed here; run this on Debian 12"
	apt-cache depends "$1" 2>/dev/null | sed -n 's/^ *Depends: *//p' | head -n1 || true
}

install_fixture_packages() {
	local key dir tmp
	key=$(printf '%s\n' "${fixture_packages[@]}" | sha256sum | cut -c1-12)
	dir=$cache/fixture-debs-$key
	if [ ! -d "$dir" ]; then
		say "downloading ${#fixture_packages[@]} Debian packages for the image fixture"
		tmp=$(fresh fixture)
		apt_download "$tmp" "${fixture_packages[@]}"
		publish "$tmp" "$dir"
	fi
	emit FIXTURE_DEBS "$dir"
}

install_lint() {
	local dir=$cache/golangci-lint-$golangci_version
	if [ ! -x "$dir/bin/golangci-lint" ]; then
		say "building golangci-lint $golangci_version, some minutes"
		local tmp
		tmp=$(fresh lint)
		go_install "$tmp" "" 0 "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v$golangci_version"
		publish "$tmp" "$dir"
	fi
	echo "$dir/bin/golangci-lint"
}

case ${1:-install} in
--print-env)
	[ -r "$cache/env" ] || die "$cache/env does not exist: run 'make tools'"
	cat "$cache/env"
	exit 0
	;;
install | lint) ;;
*) die "unknown argument $1; usage: install.sh [lint | --print-env]" ;;
esac

preflight
mkdir -p "$cache" || die "cannot create $cache: set NYDUS_TOOLS to a folder that can be written"
exec 9>"$cache/.lock"
flock -n 9 || {
	say "waiting for another run"
	flock 9
}
# Only the holder of the lock gets here: these are remains of killed runs.
rm -rf "$cache/.tmp"

if [ "${1:-install}" = lint ]; then
	install_lint
	exit 0
fi

env_tmp=$(mktemp "$cache/.env.XXXXXX")
trap 'rm -f "$env_tmp"; rm -rf "$cache/.tmp"' EXIT
install_fuse
install_registry
install_containerd16
install_fixture_packages
install_guest
install_containerd
install_runc
install_nydus
install_nydusd
chmod 0644 "$env_tmp"
mv "$env_tmp" "$cache/env"
say "ready in $cache"
