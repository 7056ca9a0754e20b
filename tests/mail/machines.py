"""A machine with a real Debian: a root whose changes go to memory, and a network namespace."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from portward.lab import namespaces
from portward.lab.agent import until

_SECONDS = 300.0


class Memory:
    """Mounts in a mount namespace of their own. A process holds the namespace, and the mounts end with it."""

    def __init__(self, pid: int) -> None:
        self._enter = ["nsenter", f"--mount=/proc/{pid}/ns/mnt"]
        self._root = Path(f"/proc/{pid}/root")

    def overlay(self, root: Path, name: str) -> Path:
        """A copy of `root` whose changes stay in memory; gives its folder as processes in the namespace see it."""
        folder = Path("/mnt") / name
        for part in ("upper", "work", "root"):
            self.seen(folder / part).mkdir(parents=True)
        options = f"lowerdir={root},upperdir={folder / 'upper'},workdir={folder / 'work'}"
        self._mount("-t", "overlay", "overlay", "-o", options, os.fspath(folder / "root"))
        return folder / "root"

    def seen(self, path: Path) -> Path:
        """A path of the mount namespace, as a process outside reaches it."""
        return self._root / path.relative_to("/")

    def argv(self, namespace: str, root: Path, argv: Sequence[str]) -> list[str]:
        """The command line that runs a program in a network namespace and in a root of `overlay`."""
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=/root"]
        return [*self._enter, f"--net=/run/netns/{namespace}", "chroot", os.fspath(root), *clean, *argv]

    def _mount(self, *arguments: str) -> None:
        subprocess.run([*self._enter, "mount", *arguments], check=True)


@contextlib.contextmanager
def memory() -> Iterator[Memory]:
    """A `Memory` for the time of a `with`. It also ends if this process is killed."""
    held = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]
    shell = "mount -t tmpfs tmpfs /mnt && exec sleep infinity"
    with subprocess.Popen([*held, "sh", "-c", shell], stdin=subprocess.DEVNULL) as process:
        try:
            mounts = Path(f"/proc/{process.pid}/mounts")
            until(lambda: process.poll() is not None or " /mnt tmpfs " in mounts.read_text(), "a place in memory")
            yield Memory(process.pid)
        finally:
            process.kill()


class Machine:
    """Programs of a root in a namespace."""

    def __init__(self, namespace: str, root: Path, memory: Memory) -> None:
        self.namespace, self._memory = namespace, memory
        self._root = memory.overlay(root, f"{namespace}-{root.name}-{time.monotonic_ns()}")
        self.root = memory.seen(self._root)
        # No name server can be reached, so no program may wait for one.
        self.write("/etc/resolv.conf", "")
        self.write("/etc/hosts", "127.0.0.1 localhost tenant.example\n::1 localhost tenant.example\n")

    def write(self, path: str, text: str) -> None:
        """Writes a file, by its absolute path in the machine."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def run(
        self, *argv: str, text: str | None = None, seconds: float = _SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end; raises subprocess.TimeoutExpired after `seconds`."""
        return subprocess.run(
            self._memory.argv(self.namespace, self._root, argv), input=text, capture_output=True, text=True,
            timeout=seconds, check=False, errors="replace",
        )  # fmt: skip

    def start(self, *argv: str, stderr: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Starts a program."""
        return subprocess.Popen(
            self._memory.argv(self.namespace, self._root, argv), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip

    def silence(self) -> None:
        """Takes the machine's only link down, so that none of its packets reaches the gateway any more."""
        namespaces.ip("-n", self.namespace, "link", "set", "eth0", "down")
