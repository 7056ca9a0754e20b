"""Makes, enters and removes network namespaces for the lab. Everything here needs root.

No packet leaves the machine: a new namespace has no link to the machine's own network, and nothing here adds one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Final

from portward.base import netns
from portward.errors import KernelError

_TIMEOUT: Final = 30.0


def require_root() -> None:
    """Raises KernelError if namespaces cannot be made: the user is not root, or `ip` or `nft` is missing."""
    if os.geteuid() != 0:
        raise KernelError("the lab makes network namespaces, and that needs root: try sudo")
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            raise KernelError(f"the program {program} is missing: install iproute2 and nftables (make setup)")


def names(prefix: str) -> list[str]:
    """The namespaces whose name begins like this."""
    return [name for name in netns.names() if name.startswith(prefix)]


def make(name: str) -> None:
    """Makes a namespace with its loopback up, and IPv6 addresses that can be used at once."""
    ip("netns", "add", name)
    sysctl(name, "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
    ip("-n", name, "link", "set", "lo", "up")


def remove(name: str) -> None:
    """Kills all processes in a namespace, and removes it."""
    found = subprocess.run(
        ["ip", "netns", "pids", name],
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        check=False,
    )
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", name)


def ip(*arguments: str) -> None:
    """Runs `ip`; raises KernelError with its error text."""
    _call(["ip", *arguments])


def batch(namespace: str, lines: Iterable[str]) -> None:
    """Runs many `ip` commands in a namespace, up to the first that fails; raises KernelError."""
    _call(["ip", "-n", namespace, "-batch", "-"], "\n".join(lines) + "\n")


def load(namespace: str, ruleset: str) -> None:
    """Loads an nftables ruleset in a namespace; raises KernelError."""
    _call(["ip", "netns", "exec", namespace, "nft", "-f", "-"], ruleset)


def sysctl(namespace: str, *settings: str) -> None:
    """Writes `name=value` settings in a namespace; raises KernelError."""
    _call(["ip", "netns", "exec", namespace, "sysctl", "-qw", *settings])


def run(
    namespace: str, argv: Sequence[str], *, text: str | None = None, timeout: float = _TIMEOUT
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a namespace until it exits; raises subprocess.TimeoutExpired after `timeout` seconds."""
    return subprocess.run(
        ["ip", "netns", "exec", namespace, *argv],
        input=text, capture_output=True, encoding="utf-8", errors="backslashreplace", timeout=timeout, check=False,
    )  # fmt: skip


def start(
    namespace: str,
    argv: Sequence[str],
    *,
    stdout: IO[bytes] | int = subprocess.DEVNULL,
    stderr: IO[bytes] | int | None = None,
    environment: dict[str, str] | None = None,
    detached: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a program in a namespace. `ip netns exec` executes the program in its own process, so the process id
    is the program's. `detached`: it goes on when the terminal is closed."""
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *argv],
        stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=detached,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Within this context, the calling thread is in the namespace. Sockets that it opens stay there afterwards."""
    with open("/proc/thread-self/ns/net", "rb") as home:  # noqa: PTH123 # a descriptor
        netns.enter(namespace)
        try:
            yield
        finally:
            netns.move(home.fileno())


def _call(argv: list[str], text: str | None = None) -> None:
    result = subprocess.run(
        argv,
        input=text,
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=_TIMEOUT,
        check=False,
    )
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise KernelError(f"{' '.join(argv)}: {said[0] if said else f'exit {result.returncode}'}")
