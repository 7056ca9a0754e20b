"""Roots of real Debian packages, kept between runs until the list of packages or the suite changes.

Each has a root of its own, because Debian's packages of Postfix and Exim conflict with each other.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from vm.image import mirror

PACKAGES: Final = {
    "postfix": ("postfix", "swaks", "libio-socket-inet6-perl", "tcpdump", "python3"),
    "exim": ("exim4-daemon-light",),
}


def roots(cache: Path) -> dict[str, Path]:
    """The folder of each root below `cache`. A missing root is made, which takes about a minute and downloads
    packages from the mirror that this machine's apt uses. Raises RuntimeError with the last lines of debootstrap
    if that fails."""
    cache.mkdir(parents=True, exist_ok=True)
    found = {name: cache / f"{name}-{_recipe(packages)}" for name, packages in PACKAGES.items()}
    for old in cache.iterdir():
        if old not in found.values():
            shutil.rmtree(old)
    missing = {name: root for name, root in found.items() if not root.exists()}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: _make(PACKAGES[name], missing[name]), missing))
    return found


def suite() -> str:
    """The host's own release of Debian, as mirrors call it."""
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def _recipe(packages: tuple[str, ...]) -> str:
    return hashlib.sha256(" ".join((suite(), *packages)).encode()).hexdigest()[:12]


def _make(packages: tuple[str, ...], root: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        made = Path(scratch) / "root"
        # debootstrap mounts /proc and /sys below the folder. In a mount namespace of its own these mounts end with
        # it, even if it is killed. Otherwise removing the folder would reach into them.
        argv = [
            "unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(packages)}",
            suite(), str(made), mirror(suite()),
        ]  # fmt: skip
        said = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if said.returncode:
            raise RuntimeError("debootstrap failed: " + " | ".join(said.stdout.splitlines()[-5:]))
        shutil.rmtree(made / "var/cache/apt", ignore_errors=True)
        made.rename(root)
