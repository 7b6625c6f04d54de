# `make` alone lists the targets. Targets with a "##" comment show up there.
#
# Variables worth knowing:
#   VERSION   what the binaries report            (default: git describe)
#   PREFIX    where `make install` puts binaries  (default: /usr/local)
#   SBINDIR   where mount(8) finds its helpers    (default: /sbin; it looks nowhere else)
#   DESTDIR   staging root for packages           (default: empty)
#   RUN       go test -run pattern                (default: all)
#   SOAK_TIME how long the random soak of `make soak` goes on (default: 30m)
#   FUZZTIME  how long each fuzz target runs      (default: 30s)
#   JOBS      packages of end-to-end tests at a time  (default: 3)
#   SHARDS    processes that share a package's tests, without RUN  (default: 2)
#   ARGS      further arguments of demo and bench (default: none)

# Go and the tool cache need it; a service or a bare container may not have it.
export HOME   ?= /root

SHELL         := /bin/bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS     += --no-builtin-rules --no-print-directory
.DELETE_ON_ERROR:

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
PREFIX   ?= /usr/local
SBINDIR  ?= /sbin
UNITDIR  ?= $(PREFIX)/lib/systemd/system
RUN      ?= .
FUZZTIME ?= 30s
JOBS     ?= 3
SHARDS   ?= 2

LDFLAGS := -s -w -X main.version=$(VERSION)
# The version is told by git describe above; asking git again fails in a
# checkout that belongs to somebody else.
GOBUILD  = CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
BINARIES := nydus-snapshotter nydus-overlayfs nydus-shim-hook

# The race detector needs cgo, and cgo a C compiler.
RACE = $(shell command -v "$$($(GO) env CC 2>/dev/null | cut -d' ' -f1)" >/dev/null 2>&1 && echo -race)

# need COMMAND,HINT: stop with a clear word when COMMAND is not in PATH.
need = command -v $(1) >/dev/null || { echo "make $@: $(1) is not in PATH. $(2)" >&2; exit 2; }
need-go   = $(call need,$(GO),Install the Go version that go.mod names or a newer one: https://go.dev/dl)

# A prerequisite, so that it comes before minutes of installing.
.PHONY: need-root
need-root:
	@[ "$$(id -u)" = 0 ] || { echo "make $(MAKECMDGOALS): needs root: it mounts filesystems and starts containers." >&2; exit 2; }

##@ Use

.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z][a-z0-9-]*:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: need-root tools build ## pull, start, read and stop a container from a nydus image, and show what happened (root)
	@cd test && $(GO) run ./demo $(ARGS)

.PHONY: install
install: build ## install into PREFIX (DESTDIR for packages), mount.nydus into SBINDIR
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(SBINDIR)' '$(DESTDIR)$(UNITDIR)'
	@# By rename: a mount that begins meanwhile finds the old program or the new one.
	for b in $(BINARIES); do \
	  install -m 0755 "bin/$$b" "$(DESTDIR)$(PREFIX)/bin/.$$b.new" && mv -f "$(DESTDIR)$(PREFIX)/bin/.$$b.new" "$(DESTDIR)$(PREFIX)/bin/$$b"; \
	done
	ln -sfn '$(PREFIX)/bin/nydus-overlayfs' '$(DESTDIR)$(SBINDIR)/mount.nydus'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|g' contrib/systemd/nydus-snapshotter.service > '$(DESTDIR)$(UNITDIR)/nydus-snapshotter.service'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|g' contrib/systemd/nydus-gateway.service > '$(DESTDIR)$(UNITDIR)/nydus-gateway.service'
	install -m 0644 contrib/systemd/nydus-gateway.socket '$(DESTDIR)$(UNITDIR)/nydus-gateway.socket'
	install -m 0644 contrib/systemd/nydus.slice '$(DESTDIR)$(UNITDIR)/nydus.slice'

##@ Build

.PHONY: build
build: $(BINARIES:%=bin/%) bin/mount.nydus ## build the static binaries into bin/

# Phony, because go build itself knows best what is out of date.
.PHONY: bin/nydus-snapshotter bin/nydus-overlayfs bin/nydus-shim-hook bin/mount.nydus
bin/nydus-snapshotter:
	@$(need-go)
	$(GOBUILD) -o $@ ./snapshotter
bin/nydus-overlayfs:
	@$(need-go)
	$(GOBUILD) -o $@ ./mount-helper
bin/nydus-shim-hook:
	@$(need-go)
	$(GOBUILD) -o $@ ./shim-hook
bin/mount.nydus: bin/nydus-overlayfs
	@ln -sfn nydus-overlayfs $@

.PHONY: tools
tools: ## install the real parts that tests and the demo use (nydusd, containerd, runc, …), once per version
	@$(need-go)
	@test/tools/install.sh

.PHONY: clean
clean: ## remove what build made (tools stay in their cache)
	rm -rf bin

##@ Test

.PHONY: test
test: need-root ## every test: unit, conformance, conventions, end to end (root)
	@$(MAKE) tools build
	@$(MAKE) test-unit
	@$(MAKE) test-e2e

.PHONY: test-unit
test-unit: need-root tools build ## the tests beside the code, with the race detector (root)
	$(GO) vet ./...
	$(GO) test $(RACE) -count=1 -timeout 20m -run '$(RUN)' ./...

# Whose subject is the kernel, the snapshotter or containerd, and not what nydusd does: the
# second daemon would tell nothing new.
ANY_DAEMON = ^(TestImages|TestPowerCut|TestSweepsUnderLoad|TestBlobsOutliveTheirImage|TestImageFilesystem|TestCompleteImage.*|TestUserNamespaceMapped|TestDownload.*|TestScrub.*|TestSignature.*|TestIntegrityOfTheKernel|TestOldKernel|TestMapped.*|TestHelperKilledAtEveryStepMapped)$$

.PHONY: test-e2e
test-e2e: export NYDUS_TEST_SHARDS = $(SHARDS)
test-e2e: need-root tools build ## conventions, end to end and kill points, with both nydusd (root)
	cd test && $(GO) vet ./... && $(GO) test -p $(JOBS) -count=1 -timeout 60m -run '$(RUN)' ./...
	@echo "== with the oldest supported nydusd"
	cd test && NYDUS_DAEMON=old $(GO) test -p $(JOBS) -count=1 -timeout 60m -run '$(RUN)' -skip '$(ANY_DAEMON)' ./mount ./e2e ./registry

.PHONY: soak
soak: need-root tools build ## the whole kill matrix, 50 kills in each cell, the random soak and random faults of registries, for SOAK_TIME each (root, hours)
	cd test && CRASH_CELLS=all CRASH_KILLS=$${CRASH_KILLS:-50} SOAK_TIME=$${SOAK_TIME:-30m} FAULTS_TIME=$${SOAK_TIME:-30m} \
	  $(GO) test -p 1 -count=1 -v -timeout 24h -run '$(RUN)' ./crash ./registry

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME
	@$(need-go)
	@grep -rH --include='*_test.go' -oE '^func Fuzz[A-Za-z0-9_]+' pkg mount-helper shim-hook snapshotter | sort -u | \
	while IFS=: read -r file func; do \
	  echo "== $${func#func } in $$(dirname "$$file"), $(FUZZTIME)"; \
	  $(GO) test -run '^$$' -fuzz "^$${func#func }\$$" -fuzztime '$(FUZZTIME)' -fuzzminimizetime 1x "./$$(dirname "$$file")"; \
	done

.PHONY: bench
bench: need-root tools build ## measure against overlayfs; writes docs/benchmarks.md (root)
	@cd test && $(GO) run ./bench $(ARGS)

##@ Check

.PHONY: lint
lint: ## golangci-lint and go.mod tidiness in both modules, shell syntax, licences
	@$(need-go)
	@linter="$$(test/tools/install.sh lint)"; \
	for dir in . test; do \
	  echo "== lint $$dir"; \
	  (cd $$dir && "$$linter" run --config '$(CURDIR)/.golangci.yml' ./... && $(GO) mod tidy -diff); \
	done
	@bash -n .ci/run test/tools/*.sh
	@$(MAKE) licenses

.PHONY: fmt
fmt: ## format the sources as lint wants them
	@$(need-go)
	@linter="$$(test/tools/install.sh lint)"; \
	for dir in . test; do (cd $$dir && "$$linter" fmt --config '$(CURDIR)/.golangci.yml' ./...); done

.PHONY: licenses
licenses: ## list the licence of every module that is linked into a binary; fails on one that is not allowed
	@cd test && $(GO) test -count=1 -v -run '^TestLicences$$' ./conventions
