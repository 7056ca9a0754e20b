"""`make test-vm`: builds the image if it is missing, boots it, and prints the results that the machine reports.

    python -m tests.vm OLD.deb NEW.deb [--cache FOLDER] [--keep FOLDER]

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

from vm.image import Image, disk, image
from vm.machine import EmulatorError, Machine

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
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "vm")
    parser.add_argument("--keep", type=Path, help="folder for the console's log and the machine's words")
    parser.add_argument("--threads", choices=("multi", "single"), default="multi", help="of qemu's, for both CPUs")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the machine is switched off on the way out
    began = time.monotonic()
    made = image(arguments.cache)
    print(f"image {made.disk.parent.name}, {time.monotonic() - began:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _payload(folder, arguments.old, arguments.new)
        try:
            return _run(made, folder, arguments.threads)
        except EmulatorError:
            print("ONCE MORE FROM THE START, with one thread of qemu's for both CPUs: twice as slow", flush=True)
            return _run(made, folder, "single")
        finally:
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                for name in ("console", "told"):
                    shutil.copyfile(folder / name, arguments.keep / name)


def _payload(folder: Path, old: Path, new: Path) -> None:
    payload = folder / "payload"
    own = Path(__file__).parent
    shutil.copytree(own / "guest", payload / "vm" / "guest", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(own / "__init__.py", payload / "vm" / "__init__.py")
    shutil.copyfile(old, payload / "old.deb")
    shutil.copyfile(new, payload / "new.deb")
    disk(payload, folder / "payload.disk", _PAYLOAD_BYTES)


def _run(made: Image, folder: Path, threads: str) -> int:
    """Runs one machine from its first boot to its end; gives the exit code. Raises EmulatorError if qemu failed
    before any check did, and a run with one thread may succeed."""
    began = time.monotonic()
    passed = failed = 0
    ended, leaks = False, True
    with Machine(made, folder / "payload.disk", folder, threads) as machine:
        try:
            for words in machine.words(_SECONDS, _SILENCE):
                at = time.monotonic() - began
                leaks = words.get("leaks", leaks)
                if "leak" in words and leaks:
                    continue
                if "stage" in words:
                    print(f"\n[{at:5.0f} s] {words['stage']}", flush=True)
                elif "note" in words:
                    print(f"           {words['note']}", flush=True)
                elif "end" in words:
                    ended = True
                elif words.keys() != {"leaks"}:
                    good = bool(words.get("good", False))
                    passed, failed = passed + good, failed + (not good)
                    mark = "ok " if good else "NOT"
                    what = words.get("what") or f"CAME OUT: {words.get('leak')}"
                    print(f"  {mark} {what}: {words.get('happened', '')}", flush=True)
        except (TimeoutError, EmulatorError) as error:
            print(error)
            if not ended:
                print("its console says:", *machine.last_words(), sep="\n", flush=True)
            # A failed check counts even if the emulator fails after it, so only a run without one is repeated.
            if isinstance(error, EmulatorError) and threads == "multi" and not (failed or ended):
                raise
    if not ended:
        failed += 1
        print("the machine did not come to the end of its tests")
    took = time.monotonic() - began
    print(f"\n{passed} passed, {failed} failed, {took:.0f} s{_missed(took)}")
    return 1 if failed else 0


def _missed(seconds: float) -> str:
    return "" if seconds <= _GOAL else f", longer than the goal of {_GOAL:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
