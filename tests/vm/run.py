"""One run of the machine, from its first boot to its end: it prints what the machine reports, as rows."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from vm.image import Image
from vm.machine import EmulatorError, Machine


@dataclass(frozen=True)
class Run:
    """How a run is done. `folder` has `payload.disk`. The machine is switched off after `seconds`, and after
    `silence` seconds without a report. A run that takes more than `goal` seconds says so. The console's log and
    the machine's words are copied into `keep`, if it is set."""

    folder: Path
    seconds: float
    silence: float
    goal: float
    keep: Path | None = None

    def twice(self, made: Image, threads: str) -> int:
        """Runs the machine, and once more if qemu failed; gives the exit code, 0 if all was good."""
        try:
            try:
                return self.once(made, threads)
            except EmulatorError:
                print(
                    "ONCE MORE FROM THE START, with one thread of qemu's for both CPUs: twice as slow", flush=True
                )
                return self.once(made, "single")
        finally:
            if self.keep:
                self.keep.mkdir(parents=True, exist_ok=True)
                for name in ("console", "told"):
                    shutil.copyfile(self.folder / name, self.keep / name)

    def once(self, made: Image, threads: str) -> int:
        """Runs one machine; gives the exit code. Raises EmulatorError if qemu failed before any check did, and a
        run with one thread may succeed."""
        began = time.monotonic()
        passed = failed = 0
        ended, leaks = False, True
        with Machine(made, self.folder / "payload.disk", self.folder, threads) as machine:
            try:
                for words in machine.words(self.seconds, self.silence):
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
        print(f"\n{passed} passed, {failed} failed, {took:.0f} s{self._missed(took)}")
        return 1 if failed else 0

    def _missed(self, seconds: float) -> str:
        return "" if seconds <= self.goal else f", longer than the goal of {self.goal:.0f} s"
