"""Releases of Debian, and root folders of their packages, made by debootstrap."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

# The releases that portward has a package for, oldest first.
RELEASES: Final = ("bookworm", "trixie")


def release() -> str:
    """The release of Debian that this machine runs, as mirrors call it."""
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def mirror() -> str:
    """The URL of the mirror that this machine's apt uses, which has all releases. Raises RuntimeError if it has
    none."""
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {release()}",
         "Origin: Debian"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    if not found:
        raise RuntimeError(f"this machine's apt knows no mirror of Debian {release()}")
    return found[0]


def bootstrap(root: Path, suite: str, packages: Iterable[str]) -> None:
    """Makes the root folder of a release, with the smallest set of packages and these. Raises RuntimeError with
    the last lines of debootstrap if that fails."""
    # debootstrap mounts /proc and /sys below the folder. In a mount namespace of its own these mounts end with it,
    # even if it is killed. Otherwise removing the folder would reach into them.
    run(
        "unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, root,
        mirror(),
    )  # fmt: skip
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)


def run(*words: str | Path) -> None:
    """Runs a program. Raises RuntimeError with its last lines if it fails."""
    said = subprocess.run(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if said.returncode:
        raise RuntimeError(f"{words[0]} failed: " + " | ".join(said.stdout.splitlines()[-5:]))
