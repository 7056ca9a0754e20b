"""`make install`: copies the files of the package to a machine that shall not have the package itself.

    python -m package.install PACKAGE.deb [--prefix FOLDER] [--destdir FOLDER]

The program gets a folder of its own, the prefix. The units lie in /etc, not in /usr/local, and name the program in
the prefix, because port 25 is closed at boot when perhaps only the root file system is mounted.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

HOME: Final = Path("usr/lib/portward")
_PROGRAM: Final = Path("usr/bin/portward")
_CONFIGURATION: Final = Path("etc/portward/portward.toml")
_UNITS: Final = Path("etc/systemd/system")
# The units that see only a part of the file system.
_AGENTS: Final = ("portward.service", "portward@.service")
# Path in the package → path here, both below the root folder. A file below none of these is not installed.
_PLACES: Final = {
    _PROGRAM: Path("usr/local/bin/portward"),
    Path("etc"): Path("etc"),
    Path("usr/lib/systemd/system"): _UNITS,
    Path("usr/lib/sysusers.d"): Path("etc/sysusers.d"),
    Path("usr/lib/tmpfiles.d"): Path("etc/tmpfiles.d"),
    Path("usr/share/doc"): Path("usr/local/share/doc"),
    Path("usr/share/man"): Path("usr/local/share/man"),
    Path("usr/share/bash-completion"): Path("usr/local/share/bash-completion"),
    Path("usr/share/fish"): Path("usr/local/share/fish"),
    Path("usr/share/zsh/vendor-completions"): Path("usr/local/share/zsh/site-functions"),
}
# All names that portward makes in the prefix.
_OWN: Final = {"bin", "lib", "root", "pyvenv.cfg", "baseline", "closed.nft", "closed-bridge.nft", "nftables"}
_GZIP: Final = b"\x1f\x8b"
# ProtectHome= and PrivateTmp= hide these from the units; /run is empty after each boot.
_UNSEEN: Final = ("home", "root", "run", "tmp")
_NEXT: Final = """\
The program is /usr/bin/portward, all of it in /usr/lib/portward. Nothing was started, nothing is enforced yet:
  systemd-sysusers portward.conf && systemd-tmpfiles --create portward.conf && systemctl daemon-reload
  edit /etc/portward/portward.toml: name your interfaces, begin with mode = "observe"
  systemctl enable --now portward-baseline portward
/usr/share/doc/portward/docs/how-to/operations.md has it step by step."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", type=Path, help="the package, as `make deb` builds it")
    parser.add_argument("--prefix", type=Path, default=Path("/opt/portward"), help="a folder for portward alone")
    parser.add_argument("--destdir", type=Path, default=Path("/"), help="what is taken for the root folder")
    arguments = parser.parse_args()
    prefix, root = arguments.prefix, arguments.destdir.absolute()
    refusal = refused(prefix, root)
    if refusal:
        sys.exit(f"make install: {refusal}")
    with TemporaryDirectory() as folder:
        stage = Path(folder)
        subprocess.run(["dpkg-deb", "--extract", arguments.package, stage], check=True)
        install(stage, root, prefix)
    print(relocated(_NEXT, prefix))


def refused(prefix: Path, root: Path) -> str:
    """The reason why nothing can be installed in `prefix` below `root`; an empty text if there is none. An
    installation replaces the whole prefix, so it may hold nothing that portward did not make."""
    if not prefix.is_absolute() or ".." in prefix.parts or prefix.name != HOME.name:
        return f"PREFIX={prefix}: a folder named {HOME.name} is wanted, by its whole path, as in /opt/portward"
    if prefix.parts[1] in _UNSEEN:
        return f"PREFIX={prefix}: the units see nothing below /{prefix.parts[1]}"
    if (root / HOME).exists():
        return "the package is installed here, whose units would be hidden: apt remove portward"
    home = root / prefix.relative_to("/")
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        return f"PREFIX={prefix} is no folder"
    if home.exists() and (strange := sorted({path.name for path in home.iterdir()} - _OWN)):
        return f"PREFIX={prefix} holds what is not portward's: {strange[0]}"
    return ""


def relocated(text: str, prefix: Path, places: Mapping[Path, Path] = _PLACES) -> str:
    """The text with each path of the package replaced by the path that the file has here."""
    for place, own in {HOME: prefix.relative_to("/"), **places}.items():
        text = re.sub(rf"(?<![\w.-])/{place}(?![\w-]|\.\w)", f"/{own}", text)
    return text


def _direct(prefix: Path) -> Mapping[Path, Path]:
    """The paths for what runs at boot: the program is named in the prefix, since /usr/local may not be mounted."""
    return {**_PLACES, _PROGRAM: prefix.relative_to("/") / "bin" / "portward"}


def install(stage: Path, root: Path, prefix: Path) -> None:
    """Copies the package's files, unpacked in `stage`, to their paths below `root`. Replaces what is there, but
    keeps a configuration. Each file is a new one, so a running agent keeps those that it has open."""
    _program(stage, root, prefix)
    for source, place in _rest(stage):
        target = root / place
        if place == _CONFIGURATION and target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.new")
        beside.unlink(missing_ok=True)
        if source.is_symlink():
            beside.symlink_to(prefix / "bin" / "portward")
        else:
            shutil.copy(source, beside)
            _relocate(beside, prefix, _direct(prefix) if _UNITS in place.parents else _PLACES)
        beside.replace(target)
    for name in _AGENTS:
        unit = root / _UNITS / name
        unit.write_text(unit.read_text().replace("\n[Service]\n", f"\n[Service]\nBindReadOnlyPaths={prefix}\n"))


def _program(stage: Path, root: Path, prefix: Path) -> None:
    home = root / prefix.relative_to("/")
    home.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".portward-", dir=home.parent) as folder:
        new = Path(folder) / "new"
        shutil.copytree(stage / HOME, new, symlinks=True)
        for text in (new / "bin" / "portward", new / "baseline", new / "nftables"):
            _relocate(text, prefix, _direct(prefix))
        _interpreter(new, prefix)
        if home.exists():
            home.rename(Path(folder) / "old")
        new.rename(home)


def _interpreter(home: Path, prefix: Path) -> None:
    """Links the interpreter by its whole path, because the package's link is relative. Compiles the program for
    the place where it will lie, because bytecode names its source. No start compares the two (unchecked-hash),
    since both are replaced at once."""
    link = home / "bin" / "python3"
    interpreter = Path("/usr/bin") / link.readlink().name
    link.unlink()
    link.symlink_to(interpreter)
    options = ("-q", "-f", "--invalidation-mode", "unchecked-hash", "-s", home, "-p", prefix)
    subprocess.run([interpreter, "-m", "compileall", *options, home / "lib"], check=True)


def _rest(stage: Path) -> Iterator[tuple[Path, Path]]:
    """All files and links but those of the program's folder, each with its path below the root folder."""
    for there, here in _PLACES.items():
        above = stage / there
        for source in [above] if above.is_symlink() else sorted(above.rglob("*")):
            if source.is_symlink() or source.is_file():
                yield source, here / source.relative_to(above)


def _relocate(path: Path, prefix: Path, places: Mapping[Path, Path]) -> None:
    """Replaces the package's paths in a text file, compressed or not."""
    data = path.read_bytes()
    if data.startswith(_GZIP):
        data = gzip.compress(relocated(gzip.decompress(data).decode(), prefix, places).encode(), 9, mtime=0)
    else:
        data = relocated(data.decode(), prefix, places).encode()
    path.write_bytes(data)


if __name__ == "__main__":
    main()
