"""One virtual machine: qemu without KVM, two cores, no network, its words on two serial ports."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from vm.image import Image

QEMU: Final = "qemu-system-x86_64"
_MEMORY: Final = "2048"
_PAUSE: Final = 0.2
# What a kernel says of itself when it does not get on any more.
_COMPLAINT: Final = re.compile(
    r"rcu: INFO|soft lockup|hard LOCKUP|hung_task|blocked for more than|BUG:|Oops|Kernel panic"
)
_COMPLAINT_LINES: Final = 120
_AT: Final = re.compile(r"Comm:|RIP: 0010:")
_CALL: Final = re.compile(r" [\w.]+\+0x")  # those with a question mark are what earlier calls left on the stack
_LAST: Final = 8
# The handler in which a CPU is found that comes to the same breakpoint again and again (not behind a question
# mark: what earlier calls left on the stack), and after how many seconds of silence it is looked for: the
# kernel reports a CPU that is stuck after half as many.
_BREAKPOINT: Final = re.compile(rb"(RIP: 0010:|\] +)asm_exc_int3\+0x")
_LOOKED_AT: Final = 60.0
# How many times slower the machine is with one thread for both CPUs: what it waits for may take as much longer.
_SLOWER: Final = {"multi": 1.0, "single": 2.0}
# An old one boots in half the time: what newer ones can do beyond it costs more to emulate than it saves.
_CPU: Final = "Nehalem"
# Without KVM each change of page tables costs much, and the mitigations change them at every system call.
_KERNEL: Final = "root=/dev/vda rw console=ttyS0 panic=5 mitigations=off audit=0 vm.slower={slower}"


def available() -> bool:
    """Whether qemu can be run here."""
    return shutil.which(QEMU) is not None


class EmulatorError(RuntimeError):
    """qemu executes what no longer stands in the machine's memory."""


class Machine:
    """A machine that is on while the `with` lasts. What it writes to the image's disk goes with it; the second
    disk, `payload`, is read only. With `threads` single, one thread of qemu's is both cores in turn."""

    def __init__(self, image: Image, payload: Path, folder: Path, threads: str = "multi") -> None:
        self._image, self._payload, self._threads = image, payload, threads
        self.console, self._reports = folder / "console", folder / "told"

    def __enter__(self) -> Machine:
        self.console.write_bytes(b"")
        self._reports.write_bytes(b"")
        self._process = subprocess.Popen(
            [
                QEMU, "-accel", f"tcg,thread={self._threads}", "-cpu", _CPU, "-smp", "2", "-m", _MEMORY,
                "-nodefaults", "-display", "none",
                "-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd),
                "-append", _KERNEL.format(slower=_SLOWER[self._threads]),
                "-drive", f"file={self._image.disk},format=raw,if=virtio,snapshot=on,cache=unsafe",
                "-drive", f"file={self._payload},format=raw,if=virtio,readonly=on",
                "-serial", f"file:{self.console}", "-serial", f"file:{self._reports}",
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def words(self, seconds: float, silence: float) -> Iterator[dict[str, Any]]:
        """What the machine tells, line by line, until it is off. Raises TimeoutError after so many seconds, and
        where it tells nothing but leaks for `silence` seconds; EmulatorError where that is because qemu sees a
        breakpoint that the kernel has taken away (`guest/keys.py`)."""
        deadline = time.monotonic() + seconds
        reported_at, console_bytes = time.monotonic(), 0
        rest = b""
        with self._reports.open("rb") as reports:
            while True:
                off = self._process.poll() is not None
                lines = (rest + reports.read()).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    if line.strip():
                        words = json.loads(line)
                        if "leak" not in words:  # the watcher lives on where all else stands still
                            reported_at, console_bytes = time.monotonic(), self.console.stat().st_size
                        yield words
                if off:
                    return
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the machine was still on after {seconds:.0f} s")
                silent = time.monotonic() - reported_at
                if silent > _LOOKED_AT and _BREAKPOINT.search(self.console.read_bytes(), console_bytes):
                    raise EmulatorError("qemu is in a breakpoint that is gone")
                if silent > silence:
                    raise TimeoutError(f"the machine told nothing for {silence:.0f} s")
                time.sleep(_PAUSE)  # pause: of a poll

    def last_words(self) -> list[str]:
        """The console's last lines, and above them what the kernel first complained of, where it did: for each CPU
        where it was, and on a line of its own the functions that led there, the innermost first."""
        said = self.console.read_text(errors="replace").splitlines()
        lines = [line.partition("] ")[2] or line for line in said if line.strip()]
        first = next((number for number, line in enumerate(lines) if _COMPLAINT.search(line)), None)
        if first is None:
            return lines[-_LAST:]
        said = [
            line for line in lines[first : first + _COMPLAINT_LINES]
            if _CALL.match(line) or _COMPLAINT.search(line) or _AT.search(line)
        ]  # fmt: skip
        found: list[str] = []
        for called, group in itertools.groupby(said, lambda line: _CALL.match(line) is not None):
            several = list(group)
            found += [" < ".join(line.strip().partition("+")[0] for line in several)] if called else several
        return [*found, "…", *lines[-_LAST:]]
