"""One virtual machine: qemu without KVM, with two cores and no network. One serial port is its console, the other
one carries its reports."""

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
# Messages of a kernel that is stuck or has crashed.
_COMPLAINT: Final = re.compile(
    r"rcu: INFO|soft lockup|hard LOCKUP|hung_task|blocked for more than|BUG:|Oops|Kernel panic"
)
_COMPLAINT_LINES: Final = 120
_AT: Final = re.compile(r"Comm:|RIP: 0010:")
_CALL: Final = re.compile(r" [\w.]+\+0x")  # a line with a question mark is a leftover of an earlier call
_LAST: Final = 8
# In a stack trace, the handler of a CPU that hits the same breakpoint again and again. A line with a question mark
# does not match, because it is a leftover of an earlier call.
_BREAKPOINT: Final = re.compile(rb"(RIP: 0010:|\] +)asm_exc_int3\+0x")
# After this many seconds of silence the console is searched for that handler. The kernel reports a stuck CPU after
# half that time.
_LOOKED_AT: Final = 60.0
# How many times slower the machine is, by `threads`. The guest multiplies its timeouts by it.
_SLOWER: Final = {"multi": 1.0, "single": 2.0}
# An old CPU boots in half the time: the instructions of newer ones cost more to emulate than they save.
_CPU: Final = "Nehalem"
# Without KVM each switch of page tables is expensive, and the mitigations switch them at every system call.
_KERNEL: Final = "root=/dev/vda rw console=ttyS0 panic=5 mitigations=off audit=0 vm.slower={slower}"


def available() -> bool:
    """Whether qemu can be run here."""
    return shutil.which(QEMU) is not None


class EmulatorError(RuntimeError):
    """qemu executes code that the guest's kernel has already overwritten."""


class Machine:
    """A machine that runs while the `with` lasts. Its writes to the image's disk are discarded at the end; the
    second disk, `payload`, is read only. If `threads` is single, one thread of qemu executes both cores in
    turn."""

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
        """The machine's reports, one by one, until it is off. Raises TimeoutError after `seconds`, or if it
        reports nothing but leaks for `silence` seconds. Raises EmulatorError if it is silent because qemu still
        executes a breakpoint that the kernel has removed (`guest/keys.py`)."""
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
                        if "leak" not in words:  # the watcher may go on although all else is stuck
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
        """The console's last lines. If the kernel reported a stuck CPU or a crash, its first report comes before
        them: for each CPU the place where it was, then on one line the functions that led there, innermost
        first."""
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
