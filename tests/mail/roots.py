"""Roots of real Debian packages, kept between runs until the list of packages or the suite changes.

Each has a root of its own, because Debian's packages of Postfix and Exim conflict with each other.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from package import debian

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


def _recipe(packages: tuple[str, ...]) -> str:
    return hashlib.sha256(" ".join((debian.release(), *packages)).encode()).hexdigest()[:12]


def _make(packages: tuple[str, ...], root: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        made = Path(scratch) / "root"
        debian.bootstrap(made, debian.release(), packages)
        made.rename(root)
