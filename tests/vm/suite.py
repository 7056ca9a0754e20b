"""`python -m tests.vm.suite [WORDS OF PYTEST]`: runs kernel tests of this checkout on Debian's own kernel.

Without words it runs what this machine's kernel may skip: the tests of bridged segments, which need nft_queue. The
machine has no network, so the libraries of the tests come from this Python's environment. It must be of the
version that Debian has. Each test is a row; the exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm.image import disk, image
from vm.run import Run

ROOT: Final = Path(__file__).resolve().parents[2]
# Bridged segments, and the modules that run on a routed and on a bridged lab alike.
BRIDGED: Final = ("tests/kernel", "-k", "bridged or bridges or br_netfilter")
_FOLDERS: Final = ("agent", "tests", "rules", "systemd", "package")
# Large libraries that no kernel test needs.
_LEFT_OUT: Final = (
    "__pycache__", "*.pth", "mypy*", "ruff*", "atheris*", "*fuzzer*", "pip", "setuptools*", "matplotlib*",
    "numpy*", "coverage*", "pytest_cov*", "xdist*", "pytest_xdist*", "babel*", "hatch*", "ast_serialize*",
    "librt*", "wheel*",
)  # fmt: skip
_PAYLOAD_BYTES: Final = 384 << 20
_SECONDS: Final = 90 * 60.0
_SILENCE: Final = 10 * 60.0
_GOAL: Final = 30 * 60.0


def main() -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "vm")
    parser.add_argument("--keep", type=Path, help="folder for the console's log and the machine's words")
    arguments, words = parser.parse_known_args()
    made = image(arguments.cache)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _payload(folder, words or list(BRIDGED))
        return Run(folder, _SECONDS, _SILENCE, _GOAL, arguments.keep).twice(made, "multi")


def _payload(folder: Path, words: list[str]) -> None:
    """The disk of the run. The image starts the programs `world` and `stages` from it, so the tests' run is put in
    the place of the latter."""
    payload, guest = folder / "payload", folder / "payload" / "vm" / "guest"
    ignored = shutil.ignore_patterns("__pycache__", "build", ".*")
    own = Path(__file__).parent
    shutil.copytree(own / "guest", guest, ignore=ignored)
    shutil.copyfile(own / "__init__.py", payload / "vm" / "__init__.py")
    (guest / "world.py").write_text('"""Nothing: each test makes its own surroundings."""\n')
    shutil.copyfile(guest / "suite.py", guest / "stages.py")
    (payload / "words.json").write_text(json.dumps(words))
    for part in _FOLDERS:
        shutil.copytree(ROOT / part, payload / "tree" / part, ignore=ignored)
    shutil.copyfile(ROOT / "pyproject.toml", payload / "tree" / "pyproject.toml")
    libraries = Path(sysconfig.get_path("purelib"))
    shutil.copytree(libraries, payload / "libraries", ignore=shutil.ignore_patterns(*_LEFT_OUT))
    disk(payload, folder / "payload.disk", _PAYLOAD_BYTES)


if __name__ == "__main__":
    sys.exit(main())
