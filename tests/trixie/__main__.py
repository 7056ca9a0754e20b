"""`make test-trixie`: runs the tests under Debian 13's Python, on this machine's kernel.

    python -m tests.trixie [PYTEST ARGUMENTS]

build/trixie keeps a root folder with Debian 13's packages and the libraries of requirements*.txt. This tree is
copied into it for each run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mail.roots import suite  # the path above must be there first
from vm.image import mirror

ROOT: Final = Path(__file__).resolve().parents[2]
PLACE: Final = ROOT / "build" / "trixie"
SUITE: Final = "trixie"
PACKAGES: Final = (
    "nftables", "iptables", "iproute2", "procps", "kmod", "libnetfilter-queue-dev", "libnfnetlink-dev", "python3",
    "python3-dev", "python3-venv", "build-essential", "netcat-openbsd", "conntrack", "netsniff-ng", "groff-base",
    "git", "ca-certificates",
)  # fmt: skip
# The files that say how this machine reaches the network.
_SETTINGS: Final = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/ssl/certs/ca-certificates.crt")
# The mounts end with the mount namespace, however the run ends.
_ENTER: Final = """
mount --bind "$0" "$0"; mount -t proc proc "$0/proc"; mount -t tmpfs tmpfs "$0/run"
for each in sys dev; do mount --rbind "/$each" "$0/$each"; mount --make-rslave "$0/$each"; done
exec chroot "$0" bash -c "$@"
"""
_SETUP: Final = """
set -e; cd /src; python3 -m venv .venv
install() { .venv/bin/pip install --quiet --disable-pip-version-check "$@"; }
install --require-hashes -r requirements.txt -r requirements-test.txt
install --require-hashes --only-binary :all: -r requirements-fuzz.txt ||
    echo "The fuzzer cannot be installed here: the tests that need it will be skipped." >&2
install --no-deps --no-build-isolation -e .
"""
_TEST: Final = 'cd /src && .venv/bin/python hatch_build.py && exec .venv/bin/python -m pytest "$@"'


def main() -> int:
    """Makes the root if it is missing, and runs the tests in it; gives pytest's exit code."""
    if not (PLACE / "made").exists():
        shutil.rmtree(PLACE, ignore_errors=True)
        PLACE.parent.mkdir(exist_ok=True)
        run("unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE,
            os.fspath(PLACE), mirror(suite()))  # fmt: skip
        for name in _SETTINGS:
            if (Path("/") / name).exists():
                shutil.copy(Path("/") / name, PLACE / name)
        copy()
        enter(_SETUP)
        (PLACE / "made").touch()
    copy()
    return enter(_TEST, "pytest", *(sys.argv[1:] or ["-n", "auto", "--dist", "loadfile"]), check=False)


def copy() -> None:
    """Copies the files of this tree, committed or not, into the root."""
    (PLACE / "src").mkdir(exist_ok=True)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        check=True,
    ).stdout.split(b"\0")  # fmt: skip
    kept = PLACE / "src" / ".venv"
    for entry in (PLACE / "src").iterdir():
        if entry != kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in filter(None, map(os.fsdecode, names)):
        if (ROOT / name).is_file():
            (PLACE / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, PLACE / "src" / name)


def enter(script: str, *words: str, check: bool = True) -> int:
    """Runs a script in the root, in a mount namespace of its own; gives its exit code."""
    argv = ("unshare", "--mount", "bash", "-e", "-c", _ENTER, os.fspath(PLACE), script, *words)
    return run(*argv, check=check)


def run(*argv: str, check: bool = True) -> int:
    """Runs a program, whose output is the caller's."""
    return subprocess.run(argv, check=check).returncode


if __name__ == "__main__":
    sys.exit(main())
