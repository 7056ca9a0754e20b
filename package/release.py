"""Runs targets of the Makefile on another release of Debian, in a root folder, on this machine's kernel.

    python -m package.release RELEASE TARGET… [--bring FOLDER]

build/RELEASE keeps a small Debian with what `make` itself needs; the targets install the rest, as on a fresh
machine. This tree is copied into it for each run. With `--bring`, the packages (.deb) that the targets left in
FOLDER are copied back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from package import debian

ROOT: Final = Path(__file__).resolve().parents[1]
# The tree below the root folder of a release.
_TREE: Final = Path("src")
_PACKAGES: Final = ("make", "ca-certificates")
# The files that say how this machine reaches the network.
_SETTINGS: Final = (
    "etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/ssl/certs/ca-certificates.crt", "etc/apt/apt.conf.d",
)  # fmt: skip
# What the targets keep in the tree between runs.
_KEPT: Final = (".venv", ".cache", "build", "dist")
# The mounts end with the mount namespace, however the run ends.
_ENTER: Final = """
mount --bind "$0" "$0"; mount -t proc proc "$0/proc"; mount -t tmpfs tmpfs "$0/run"
for each in sys dev; do mount --rbind "/$each" "$0/$each"; mount --make-rslave "$0/$each"; done
exec chroot "$0" sh -c 'cd /src && exec make "$@"' make "$@"
"""


def main() -> int:
    """The command line; gives the exit code of make."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("release", choices=debian.RELEASES)
    parser.add_argument("words", nargs="+", metavar="TARGET", help="a target of the Makefile, or VARIABLE=VALUE")
    parser.add_argument(
        "--bring", type=Path, metavar="FOLDER", help="copy its packages back, relative to the tree"
    )
    asked = parser.parse_args()
    place = ROOT / "build" / asked.release
    _make(place, asked.release)
    copy(place / _TREE)
    code = subprocess.run(
        ["unshare", "--mount", "sh", "-e", "-c", _ENTER, place, *asked.words], check=False
    ).returncode
    if not code and asked.bring:
        (ROOT / asked.bring).mkdir(parents=True, exist_ok=True)
        for path in (place / _TREE / asked.bring).glob("*.deb"):
            shutil.copy2(path, ROOT / asked.bring / path.name)
    return code


def _make(place: Path, release: str) -> None:
    """Makes the root folder, if it is not there."""
    if (place / "made").exists():
        return
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    debian.bootstrap(place, release, _PACKAGES)
    for name in _SETTINGS:
        source, target = Path("/") / name, place / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, target)
    (place / "made").touch()


def copy(tree: Path) -> None:
    """Copies the files of this tree, committed or not, with their times, so that `make` sees what is new. Removes
    what is not there any more."""
    tree.mkdir(exist_ok=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        check=True,
    ).stdout.split(b"\0")  # fmt: skip
    names = {name for name in map(os.fsdecode, filter(None, listed)) if (ROOT / name).is_file()}
    for name in _left(tree) - names:
        (tree / name).unlink()
    for name in names:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_mtime_ns != (ROOT / name).stat().st_mtime_ns:
            shutil.copy2(ROOT / name, target)


def _left(tree: Path) -> set[str]:
    """The files of the tree, without those that the targets make and keep."""

    def files() -> Iterator[Path]:
        for folder, folders, names in os.walk(tree):
            if Path(folder) == tree:
                folders[:] = [name for name in folders if name not in _KEPT]
            yield from (Path(folder, name) for name in names)

    # Compiled catalogues belong to the environment.
    return {str(path.relative_to(tree)) for path in files() if path.suffix != ".mo"}


if __name__ == "__main__":
    sys.exit(main())
