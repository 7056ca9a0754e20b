"""One virtual machine: qemu without KVM, two cores, no network, its words on two serial ports."""

from __future__ import annotations

import json
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
# An old one boots in half the time: what newer ones can do beyond it costs more to emulate than it saves.
_CPU: Final = "Nehalem"
# Without KVM each change of page tables costs much, and the mitigations change them at every system call.
_KERNEL: Final = "root=/dev/vda rw console=ttyS0 panic=5 mitigations=off audit=0"


def available() -> bool:
    """Whether qemu can be run here."""
    return shutil.which(QEMU) is not None


class Machine:
    """A machine that is on while the `with` lasts. What it writes to the image's disk goes with it; the second
    disk, `payload`, is read only."""

    def __init__(self, image: Image, payload: Path, folder: Path) -> None:
        self._image, self._payload = image, payload
        self.console, self._told = folder / "console", folder / "told"

    def __enter__(self) -> Machine:
        self._told.touch()
        self._process = subprocess.Popen(
            [
                QEMU, "-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", "2", "-m", _MEMORY,
                "-nodefaults", "-display", "none",
                "-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd),
                "-append", _KERNEL,
                "-drive", f"file={self._image.disk},format=raw,if=virtio,snapshot=on,cache=unsafe",
                "-drive", f"file={self._payload},format=raw,if=virtio,readonly=on",
                "-serial", f"file:{self.console}", "-serial", f"file:{self._told}",
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def words(self, seconds: float) -> Iterator[dict[str, Any]]:
        """What the machine tells, line by line, until it is off. Raises TimeoutError after so many seconds."""
        deadline = time.monotonic() + seconds
        rest = b""
        with self._told.open("rb") as told:
            while True:
                off = self._process.poll() is not None
                lines = (rest + told.read()).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    if line.strip():
                        yield json.loads(line)
                if off:
                    return
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the machine was still on after {seconds:.0f} s")
                time.sleep(_PAUSE)
