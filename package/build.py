"""`make deb`: dist/portward_VERSION_amd64.deb, from this checkout and the locked packages of requirements.txt.

    python -m package.build [--version VERSION]… [--output FOLDER]

The program has a Python environment of its own under /usr/lib/portward, whose interpreter is Debian's. dpkg-deb
and the files in package/debian are all there is to it. It is to be run by the interpreter of .venv, where portward
is installed, and what its libraries need is known.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from email.utils import format_datetime
from importlib.metadata import requires
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from package import completions, manual
from portward import __version__

ROOT: Final = Path(__file__).resolve().parents[1]
HOME: Final = Path("usr/lib/portward")
_DEBIAN: Final = ROOT / "package" / "debian"
_PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
_SITE: Final = HOME / "lib" / _PYTHON / "site-packages"
# [lab]: `portward lab` is how an operator tries the package without touching the gateway's own network.
_PROGRAM: Final = "portward[lab]"


def main() -> None:
    """The command line; prints the path of the package."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--version",
        action="append",
        help="what package and program call themselves; several times: several packages",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    stage = ROOT / "build" / "deb"
    prepare(stage)
    for version in arguments.version or [__version__]:
        print(pack(stage, version, arguments.output))


def prepare(stage: Path) -> None:
    """Puts all that no version stands in into the folder `stage`, as it will lie on the machine."""
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    os.umask(0o022)
    _environment(stage)
    _portward(stage)
    _program(stage)
    _strip(stage)
    compile_below(stage, _SITE)
    _system_files(stage)


def pack(stage: Path, version: str, output: Path) -> Path:
    """Makes a package of it in the folder `output`; gives its path."""
    shutil.rmtree(stage / "DEBIAN", ignore_errors=True)
    own = _SITE / "portward" / "__init__.py"
    text = re.sub(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', (stage / own).read_text())
    (stage / own).write_text(text)
    compile_below(stage, own)
    documents(stage, version)
    _control(stage, version)
    output.mkdir(parents=True, exist_ok=True)
    package = output / f"portward_{version}_amd64.deb"
    _run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", stage, package)
    return package


def _environment(stage: Path) -> None:
    """What `python3 -m venv /usr/lib/portward` would leave there, without its own copies of pip and of the shells'
    `activate`: the environment is one program's."""
    (stage / HOME / "bin").mkdir(parents=True)
    (stage / _SITE).mkdir(parents=True)
    (stage / HOME / "bin" / "python3").symlink_to(f"/usr/bin/{_PYTHON}")
    (stage / HOME / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")


def _portward(stage: Path) -> None:
    site = stage / _SITE
    wanted = stage.parent / "requirements.txt"
    wanted.write_text("".join(locked(closure(_PROGRAM))))
    _pip("--require-hashes", "--no-deps", "--target", site, "-r", wanted)
    _pip("--no-deps", "--no-build-isolation", "--target", site, ROOT)
    # Programs of the libraries, whose first lines name this folder; a library's own tests.
    for folder in ("bin", "aiosmtpd/docs", "aiosmtpd/qa", "aiosmtpd/tests"):
        shutil.rmtree(site / folder, ignore_errors=True)
    for record in site.glob("*.dist-info/direct_url.json"):  # names this folder too
        record.unlink()


def closure(program: str) -> set[NormalizedName]:
    """The names of all packages that a requirement needs here, but not its own."""
    found: set[NormalizedName] = set()
    waiting = [Requirement(program)]
    while waiting:
        wanted = waiting.pop()
        for line in requires(wanted.name) or []:
            needed = Requirement(line)
            environments = [{"extra": extra} for extra in wanted.extras or {""}] + [{"extra": ""}]
            if needed.marker is None or any(map(needed.marker.evaluate, environments)):
                name = canonicalize_name(needed.name)
                if name not in found or needed.extras:
                    found.add(name)
                    waiting.append(needed)
    return found


def locked(names: set[NormalizedName]) -> list[str]:
    """The entries of requirements.txt for these packages, with their hashes; raises KeyError for one that is not
    there."""
    text = (ROOT / "requirements.txt").read_text()
    entries = {
        canonicalize_name(entry.partition("==")[0]): entry
        for entry in re.findall(r"(?m)^[a-zA-Z0-9].*(?:\n .*)*\n", text)
    }
    return [entries[name] for name in sorted(names)]


def _pip(*words: str | Path) -> None:
    _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
        "--root-user-action=ignore", *words,
    )  # fmt: skip


def _program(stage: Path) -> None:
    """/usr/bin/portward. The interpreter's own options keep what lies in the caller's folder, home and environment
    out of a program that runs as root."""
    path = stage / HOME / "bin" / "portward"
    path.write_text("#!/usr/lib/portward/bin/python3 -I\nfrom portward.cli import main\n\nmain()\n")
    path.chmod(0o755)
    (stage / "usr/bin").mkdir(parents=True)
    (stage / "usr/bin/portward").symlink_to("../lib/portward/bin/portward")


def _strip(stage: Path) -> None:
    """Takes out of the libraries what only a debugger reads."""
    for library in (stage / _SITE).rglob("*.so"):
        _run("strip", "--strip-unneeded", library)


def compile_below(root: Path, what: Path, *, at: Path = Path("/")) -> None:
    """Bytecode for `what` below the folder `root`, which will lie at `at`, since bytecode names its source: the
    agent's user cannot write it there, and a start does not wait for it. Whoever replaces the source replaces it
    too, so no start compares them."""
    _run(
        f"/usr/bin/{_PYTHON}", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash",
        "-s", root, "-p", at, root / what,
    )  # fmt: skip


def _system_files(stage: Path) -> None:
    units = ROOT / "systemd"
    for source, target, mode in (
        ("portward.service", "lib/systemd/system/portward.service", 0o644),
        ("portward-baseline.service", "lib/systemd/system/portward-baseline.service", 0o644),
        ("nftables.service.conf", "lib/systemd/system/nftables.service.d/portward.conf", 0o644),
        ("portward.preset", "lib/systemd/system-preset/50-portward.preset", 0o644),
        ("sysusers.conf", "usr/lib/sysusers.d/portward.conf", 0o644),
        ("tmpfiles.conf", "usr/lib/tmpfiles.d/portward.conf", 0o644),
        ("baseline", "usr/lib/portward/baseline", 0o755),
        ("nftables", "usr/lib/portward/nftables", 0o755),
        ("portward.toml", "etc/portward/portward.toml", 0o644),
        ("../rules/nftables/closed.nft", "usr/lib/portward/closed.nft", 0o644),
    ):
        _put(units / source, stage / target, mode)
    _root(stage / HOME / "root")


def _root(root: Path) -> None:
    """What the agent sees as its file system: here the places, which portward.service fills."""
    for folder in ("dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr"):
        (root / folder).mkdir(parents=True)
    for folder in ("cache/portward", "lib/portward", "tmp"):
        (root / "var" / folder).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")


def documents(stage: Path, version: str) -> None:
    """Puts the texts for people, the manual and the shells' completions there."""
    documents = stage / "usr/share/doc/portward"
    for name in ("README.md", "docs/how-to/operations.md", "docs/how-to/runbook.md", "docs/how-to/restore.md"):
        _put(ROOT / name, documents / Path(name).name)
    _put(_DEBIAN / "copyright", documents / "copyright")
    date = format_datetime(_date())
    _zip(
        documents / "changelog.gz",
        f"portward ({version}) unstable; urgency=medium\n\n  * What changed stands in CHANGELOG.md.\n\n"
        f" -- portward developers <developers@portward.example>  {date}\n",
    )
    _zip(documents / "CHANGELOG.md.gz", (ROOT / "CHANGELOG.md").read_text())
    for name, text in manual.pages(version, _date()):
        _zip(stage / "usr/share/man/man1" / f"{name}.1.gz", text)
    for target, text in completions.files().items():
        path = stage / "usr/share" / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    _put(_DEBIAN / "lintian-overrides", stage / "usr/share/lintian/overrides/portward")


def _control(stage: Path, version: str) -> None:
    control = stage / "DEBIAN"
    control.mkdir()
    kib = sum(path.lstat().st_size for path in stage.rglob("*") if not path.is_dir()) // 1024
    major, minor = sys.version_info[:2]
    text = (_DEBIAN / "control").read_text()
    for name, value in (
        ("VERSION", version),
        ("SIZE", str(kib)),
        ("PYTHON", f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1}), {_PYTHON}"),
    ):
        text = text.replace(f"@{name}@", value)
    (control / "control").write_text(text)
    (control / "conffiles").write_text("/etc/portward/portward.toml\n")
    for name in ("preinst", "postinst", "prerm", "postrm"):
        if (_DEBIAN / name).exists():
            _put(_DEBIAN / name, control / name, 0o755)
    sums = [
        f"{_md5(path)}  {path.relative_to(stage)}\n"
        for path in sorted(stage.rglob("*"))
        if path.is_file() and not path.is_symlink() and control not in path.parents
    ]
    (control / "md5sums").write_text("".join(sums))


def _put(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _zip(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _date() -> datetime:
    """Of the last commit, so that the same checkout makes the same documents."""
    said = subprocess.run(
        ["git", "-C", ROOT, "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False
    )
    return datetime.fromtimestamp(int(said.stdout or 0), UTC)


def _md5(path: Path) -> str:
    return subprocess.run(["md5sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def _run(*words: str | Path) -> None:
    subprocess.run(list(map(str, words)), check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
