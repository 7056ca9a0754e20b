# Everything here does its own set-up: on a fresh Debian 12 or 13, as root, `make demo` is enough.
PYTHON ?= /usr/bin/python3
VENV   := .venv
BIN    := $(VENV)/bin
PREFIX ?= /opt/portward

# The programs that portward runs, those that build NetfilterQueue, and those with which lab and tests send packets.
PACKAGES := nftables iptables iproute2 procps libnetfilter-queue-dev libnfnetlink-dev \
            python3 python3-dev python3-venv build-essential netcat-openbsd conntrack netsniff-ng groff-base locales

# The release of Debian that this machine runs, and the one that a package and a virtual machine are of: bookworm or
# trixie. The package of another release is built in a root folder of that release (package/release.py).
HOST    := $(shell . /etc/os-release && echo $$VERSION_CODENAME)
RELEASE := $(HOST)

.DEFAULT_GOAL := help
.PHONY: help setup program packages demo messages clean
.PHONY: test coverage test-lowest test-trixie test-mail test-vm soak lint house bench bench-short
.PHONY: docs deb install inside vm-packages

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: program $(VENV)/test-ready $(VENV)/lint-ready $(VENV)/fuzz-ready ## Install all that portward, its tests and linters need

program: packages $(VENV)/ready ## Install what portward and its lab need: system packages and the Python environment

packages:
	@missing=$$(for p in $(PACKAGES); do \
	    dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing $$missing"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi

# Texts in other languages; the build compiles them (hatch_build.py).
CATALOGUES := $(wildcard agent/portward/locale/*/LC_MESSAGES/*.po)

# Every package is locked by version and hash. Each purpose has its own file, so that one that cannot be installed
# stops nothing else.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

$(VENV)/ready: pyproject.toml requirements.txt hatch_build.py $(CATALOGUES)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --require-hashes -r requirements.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/%-ready: requirements-%.txt | $(VENV)/ready
	$(INSTALL) --require-hashes -r $<
	@touch $@

# The fuzzer has wheels for few platforms, and its sources need a C++ compiler of their own. Without it the rest works.
$(VENV)/fuzz-ready: requirements-fuzz.txt | $(VENV)/ready
	@if $(INSTALL) --retries 1 --only-binary :all: --require-hashes -r $<; then touch $@; \
	else echo "The fuzzer of $< cannot be installed here: the tests that need it will be skipped." >&2; fi

demo: program ## Send real mail through a gateway in network namespaces (root)
	$(BIN)/portward lab demo

# Two processes for each core: half of the time a test waits. The tests of a file stay in one process, because they
# share a lab.
PROCESSES := $(shell echo $$((2 * $$(nproc))))

# For a part of them: make test ONLY="tests/kernel tests/program".
ONLY :=

test: setup ## Run all tests: unit, kernel, whole program (root)
	$(BIN)/pytest -n $(PROCESSES) --dist loadfile $(ONLY)

coverage: setup ## Run the unit tests, and print which branches they take, by room
	@mkdir -p build
	$(BIN)/pytest -n $(PROCESSES) --dist loadfile --cov --cov-report=json:build/coverage.json tests/unit
	$(BIN)/python -m tests.covered build/coverage.json

# An environment of its own, with the libraries of requirements-lowest.txt in place of the newer ones.
LOWEST := .venv-lowest

# The rooms that a library does something for.
USERS := $(addprefix tests/unit/,cli config inventory metrics policy store table)

$(LOWEST)/ready: INSTALL = $(LOWEST)/bin/pip install --quiet --disable-pip-version-check
$(LOWEST)/ready: pyproject.toml requirements.txt requirements-test.txt requirements-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(INSTALL) --require-hashes -r requirements.txt -r requirements-test.txt
	$(INSTALL) --require-hashes --no-deps -r requirements-lowest.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	$(LOWEST)/bin/pip check
	@touch $@

test-lowest: packages $(LOWEST)/ready ## Run the tests of what libraries do, with the oldest that pyproject.toml allows
	$(LOWEST)/bin/portward --version
	$(LOWEST)/bin/pytest -n $(PROCESSES) --dist loadfile $(USERS)

test-mail: setup ## Send mail with Postfix, Exim, swaks and Python, tcpdump beside it, some four minutes (root)
	$(MAKE) packages PACKAGES="debootstrap"
	$(BIN)/python -m tests.mail

# For a part of them: make test-trixie ONLY="tests/unit/dataplane tests/program".
test-trixie: ## Run the tests on Debian 13, with Python 3.13, in a root folder of its own (root)
	$(MAKE) inside RELEASE=trixie DO=test

# $(call within,TARGETS) runs targets in the root folder of RELEASE. The variables of this command line reach them.
within = $(PYTHON) -m package.release $(RELEASE) $(1)

inside: ## Run the targets DO in a root folder of RELEASE: make inside RELEASE=trixie DO="demo test" (root)
	$(MAKE) packages PACKAGES="debootstrap"
	$(call within,$(DO) ONLY="$(ONLY)")

# $(call package,VERSION,FOLDER) builds the Debian package FOLDER/portward_VERSION_amd64.deb, in a copy of this tree:
# debhelper's clean-up deletes editors' backup files too, and a copy can be given another version.
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' agent/portward/__init__.py)
# The package of a later release has a later version, so that an upgrade of Debian takes it.
SUFFIX_trixie := +deb13
DEB_VERSION := $(VERSION)$(SUFFIX_$(RELEASE))
DEB     := portward_$(DEB_VERSION)_amd64.deb
COPY    := build/package/portward
package = rm -rf build/package && mkdir -p $(COPY) $(2) && \
          tar --create --exclude='./.?*' --exclude=./build --exclude=./dist . | tar --extract --directory $(COPY) && \
          sed -i 's/$(VERSION)/$(1)/' $(COPY)/agent/portward/__init__.py $(COPY)/debian/changelog && \
          (cd $(COPY) && BUILDER=$(CURDIR)/$(BIN)/python dpkg-buildpackage --build=binary --no-sign) && \
          mv build/package/portward_$(1)_amd64.deb $(2)

# The same package as a later version, to be upgraded to. Python allows one plus sign.
NEXT := $(DEB_VERSION)$(if $(SUFFIX_$(RELEASE)),.,+)next

# The package in both versions, in build/vm, without errors of lintian.
vm-packages: program
	$(MAKE) packages PACKAGES="debhelper lintian"
	$(call package,$(DEB_VERSION),build/vm)
	$(call package,$(NEXT),build/vm)
	lintian --allow-root --fail-on error build/vm/$(DEB)

test-vm: setup ## Boot a Debian (RELEASE) in a virtual machine and test the package in it, some twelve minutes (root)
	$(MAKE) packages PACKAGES="qemu-system-x86 debootstrap e2fsprogs"
ifeq ($(RELEASE),$(HOST))
	$(MAKE) vm-packages
else
	$(call within,vm-packages --bring build/vm)
endif
	$(BIN)/python -m tests.vm --release $(RELEASE) build/vm/$(DEB) build/vm/portward_$(NEXT)_amd64.deb

# How long each kind of input is fuzzed, in seconds.
FUZZ := 300

soak: setup ## The long forms of faults, floods and fuzzers: about an hour (root)
	$(BIN)/python -m tests.faults --rounds 5
	$(BIN)/python -m tests.fuzz.queue --packets 1000000
	$(BIN)/python -m tests.fuzz.parser --seconds $(FUZZ)
	for kind in config preset yaml json record; do \
	    $(BIN)/python -m tests.inputs.fuzz $$kind --seconds $(FUZZ) || exit 1; done
	$(BIN)/python -m tests.bench neighbours counted stale

# All that people read; pyproject.toml says what is left out.
SPELLED := agent tests package debian docs rules systemd .ci $(wildcard *.md *.py) Makefile pyproject.toml

lint: setup ## ruff, mypy --strict, spelling and plain English
	$(BIN)/ruff check agent tests package
	$(BIN)/ruff format --check agent tests package
	$(BIN)/mypy
	$(BIN)/codespell $(SPELLED)
	$(BIN)/python -m tests.prose

house: setup ## Measure how much of the code a newcomer must read, beside the goals
	$(BIN)/python -m tests.house

messages: setup ## Bring the catalogues in step with the texts in the code
	$(BIN)/python -m tests.messages
	$(BIN)/python hatch_build.py

bench: setup $(VENV)/bench-ready ## Measure speed and scale, some ten minutes: bench.json, docs/explanation/bench/*.svg (root)
	$(BIN)/python -m tests.bench

bench-short: setup ## The ratios alone, in a minute; fails below a floor (root)
	$(BIN)/python -m tests.bench --short

# A Python environment of its own: the site's libraries have other versions than the agent's.
DOCS := .venv-docs

$(DOCS)/ready: requirements-docs.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-docs.txt
	@touch $@

# The variable silences an advertisement for another program, which the theme prints.
docs: setup $(DOCS)/ready ## Build the documents as a site in build/site, and check every link in it
	$(BIN)/python -m package.reference
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	$(BIN)/python -m package.links build/site

ifeq ($(RELEASE),$(HOST))
deb: program ## Build dist/portward_VERSION_amd64.deb, of this release of Debian or of RELEASE
	$(MAKE) packages PACKAGES="debhelper"
	$(call package,$(DEB_VERSION),dist)
else
deb:
	$(MAKE) packages PACKAGES="debootstrap"
	$(call within,deb --bring dist)
endif

install: deb ## Install program and units without the package: PREFIX (/opt/portward), DESTDIR
	$(BIN)/python -m package.install dist/$(DEB) --prefix "$(PREFIX)" --destdir "$(DESTDIR)/"

clean: ## Remove what the other targets made in this folder
	rm -rf $(VENV) $(LOWEST) $(DOCS) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
