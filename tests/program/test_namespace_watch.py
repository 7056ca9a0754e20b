"""The end of a network namespace, as a process in it sees it: real namespaces, real mounts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from kernel.conftest import lab_name
from portward.lab import namespaces

# Watches without looking now and then, and prints each look. `ip netns exec` gives the process mounts of its own,
# which follow the host's, as a unit of systemd does.
_WATCH = """
import asyncio, sys
from portward.base import netns
from portward.daemon import namespace_watch
from portward.errors import PortwardError
real = netns.is_own
def look(name):
    found = real(name)
    print(found, flush=True)
    return found
netns.is_own = look
namespace_watch._INTERVAL_S = 24 * 3600.0
try:
    asyncio.run(namespace_watch.watch(sys.argv[1]))
except PortwardError:
    print("ended", flush=True)
"""
_SECONDS = 60.0


def removed(name: str) -> None:
    """The namespace goes."""
    namespaces.ip("netns", "del", name)


def made_anew(name: str) -> None:
    """Another namespace has the name at once."""
    removed(name)
    namespaces.ip("netns", "add", name)


def unmounted(name: str) -> None:
    """The file stays, which no directory watch would see."""
    subprocess.run(["umount", f"/run/netns/{name}"], check=True)


def covered(name: str) -> None:
    """Another namespace is mounted over it."""
    subprocess.run(["mount", "--bind", "/proc/self/ns/net", f"/run/netns/{name}"], check=True)


@pytest.fixture
def name() -> Iterator[str]:
    """A namespace of this test."""
    found = lab_name()
    namespaces.make(found)
    yield found
    for _ in range(2):  # `covered` mounts one more
        subprocess.run(["ip", "netns", "del", found], capture_output=True, check=False)


@pytest.mark.parametrize("change", [removed, made_anew, unmounted, covered])
def test_the_kernel_reports_that_a_namespace_has_lost_its_name(name: str, change: Callable[[str], None]) -> None:
    watching = namespaces.start(name, [sys.executable, "-c", _WATCH, name], stdout=subprocess.PIPE)
    assert watching.stdout is not None
    with watching:
        try:
            assert watching.stdout.readline() == b"True\n"
            change(name)
            rest = watching.communicate(timeout=_SECONDS)[0].splitlines()
        finally:
            watching.kill()
    assert rest[-2:] == [b"False", b"ended"]
