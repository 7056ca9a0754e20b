"""`make test-vm`: builds the image if it is missing, boots it, and prints the results that the machine reports.

    python -m tests.vm OLD.deb NEW.deb [--release RELEASE] [--cache FOLDER] [--keep FOLDER]

The exit code is 1 if a check failed, or if the machine did not reach the end of its tests.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from package import debian

from vm.image import disk, image
from vm.run import Run

ROOT: Final = Path(__file__).resolve().parents[2]
# The goal for the whole target, in seconds, if the image exists. A longer run still passes.
_GOAL: Final = 15 * 60.0
# After this many seconds the machine is switched off. No run needs that long, not even on a busy host.
_SECONDS: Final = 40 * 60.0
# After this many seconds without a report the machine is switched off. In runs that reached their end, the
# longest silence was about three minutes.
_SILENCE: Final = 8 * 60.0
_PAYLOAD_BYTES: Final = 128 << 20


def main() -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="the package")
    parser.add_argument("new", type=Path, help="the same package with a later version")
    parser.add_argument(
        "--release",
        choices=debian.RELEASES,
        default=debian.release(),
        help="of Debian; both packages are of it, too",
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "vm")
    parser.add_argument("--keep", type=Path, help="folder for the console's log and the machine's words")
    parser.add_argument("--threads", choices=("multi", "single"), default="multi", help="of qemu's, for both CPUs")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the machine is switched off on the way out
    began = time.monotonic()
    made = image(arguments.cache, arguments.release)
    print(f"image {arguments.release}/{made.disk.parent.name}, {time.monotonic() - began:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _payload(folder, arguments.old, arguments.new)
        return Run(folder, _SECONDS, _SILENCE, _GOAL, arguments.keep).twice(made, arguments.threads)


def _payload(folder: Path, old: Path, new: Path) -> None:
    payload = folder / "payload"
    own = Path(__file__).parent
    shutil.copytree(own / "guest", payload / "vm" / "guest", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(own / "__init__.py", payload / "vm" / "__init__.py")
    shutil.copyfile(old, payload / "old.deb")
    shutil.copyfile(new, payload / "new.deb")
    disk(payload, folder / "payload.disk", _PAYLOAD_BYTES)


if __name__ == "__main__":
    sys.exit(main())
