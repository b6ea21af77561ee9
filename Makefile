# berth: `make demo` shows it, `make test` checks it; both install what they need first.
SHELL := /bin/bash
CARGO ?= cargo
PREFIX ?= /usr
DESTDIR ?=
SEEDS ?= 500
FAULTS ?= 500
MINUTES ?= 30
ARCH ?= $(shell dpkg --print-architecture 2>/dev/null)
RELEASE := target/release

.PHONY: help setup build demo test sim bench soak install release reproducible clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install by apt what building, demo and tests need, where it is missing
	@tests/setup

build: ## build the three programs into target/release/
	@tests/setup build
	@# Each for itself: in one build the agent would get what the controller asks of the crates that they share, 0.6 MiB.
	@$(CARGO) build --release $(if $(wildcard $(RELEASE)/berth),--quiet) -p berth-agent --bins
	@$(CARGO) build --release $(if $(wildcard $(RELEASE)/berth),--quiet) -p berth-controller --bins

demo: build ## a controller, two agents, a network trained on real data: under 30 s once built
	@tests/setup demo
	@docs/demo/run

test: setup ## every check; what cannot run here says why and is counted
	@tests/all

sim: ## play SEEDS=500 histories with the simulator, or one with SEED=7
	@$(CARGO) build --quiet -p berth-tests --bin sim
	@target/debug/sim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

bench: build ## measure speed and size against the figures asked, beside Slurm and podman, into target/bench.jsonl
	@tests/setup bench
	@$(CARGO) run --release --quiet -p berth-tests --bin bench
	@BERTH_CHECKPOINT_CYCLES=100 $(CARGO) test --quiet --workspace --test checkpoint a_counter_moves_again

soak: build ## break the real programs, FAULTS=500 times in MINUTES=30, with one SEED=7, and see that nothing is lost
	@tests/setup bench
	@$(CARGO) run --release --quiet -p berth-tests --bin soak -- --faults $(FAULTS) --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

install: ## install programs, CRIU, units, manual and sample configuration below PREFIX=/usr
	install -Dm755 -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/berth $(RELEASE)/berth-agent $(RELEASE)/berth-controller
	install -Dm644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system systemd/*.service
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	$(RELEASE)/berth completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/berth
	$(RELEASE)/berth man $(DESTDIR)$(PREFIX)/share/man/man1
	if [ -x $(RELEASE)/criu/criu ]; then \
	  install -d $(DESTDIR)$(PREFIX)/lib/berth/criu && \
	  cp -R --remove-destination $(RELEASE)/criu/. $(DESTDIR)$(PREFIX)/lib/berth/criu; fi
	for f in agent controller; do \
	  [ -e $(DESTDIR)/etc/berth/$$f.toml ] || install -Dm644 systemd/$$f.toml $(DESTDIR)/etc/berth/$$f.toml; done

release: ## Debian packages for x86_64 and aarch64, the agent for armv7 too, SBOMs and SHA256SUMS into target/debian/
	@tests/setup release
	@systemd/package
	@[ "$$(dpkg --print-architecture)" = arm64 ] || systemd/package --test arm64

reproducible: ## make the packages for ARCH=amd64 twice, in two places, and compare every byte
	@tests/setup release
	@systemd/package --again $(ARCH)

clean: ## remove everything built
	$(CARGO) clean
