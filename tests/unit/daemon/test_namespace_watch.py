"""The agent of an instance ends when its namespace has lost its name. `tests/program/test_namespace_watch.py`
shows that with real namespaces."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator

import pytest

from portward.base import netns
from portward.base.mounts import MountChanges
from portward.daemon import namespace_watch
from portward.errors import PortwardError

SECONDS = 60.0


class Names:
    """The names that the namespace of the process has, and how often one was looked at."""

    def __init__(self) -> None:
        self.own, self.looks = {"blue"}, 0

    def is_own(self, name: str) -> bool:
        """As `netns.is_own`."""
        self.looks += 1
        return name in self.own


class Mounts:
    """Changes of mounts that a test makes."""

    def __init__(self) -> None:
        self._theirs, self._ours = os.pipe()
        self.closed = False

    def fileno(self) -> int:
        """The descriptor that is readable after a change."""
        return self._theirs

    def change(self) -> None:
        """A change of a mount."""
        os.write(self._ours, b"x")

    def drain(self) -> None:
        """Reads one change."""
        os.read(self._theirs, 1)

    def close(self) -> None:
        """Closes both ends."""
        if not self.closed:
            os.close(self._theirs)
            os.close(self._ours)
        self.closed = True


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    found = Names()
    monkeypatch.setattr(netns, "is_own", found.is_own)
    return found


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounts]:
    """Changes of mounts, and no look without one."""
    found = Mounts()
    monkeypatch.setattr(namespace_watch, "MountChanges", lambda: found)
    monkeypatch.setattr(namespace_watch, "_INTERVAL_S", 24 * 3600.0)
    yield found
    found.close()


async def until_looked(names: Names, times: int) -> None:
    """Waits until the name was looked at so often."""
    async with asyncio.timeout(SECONDS):
        while names.looks < times:
            await asyncio.sleep(0.01)  # pause: of a poll


def test_a_change_of_a_mount_is_a_reason_to_look(names: Names, mounts: Mounts) -> None:
    async def run() -> None:
        watching = asyncio.ensure_future(namespace_watch.watch("blue"))
        await until_looked(names, 1)
        mounts.change()
        await until_looked(names, 2)
        assert not watching.done(), "another mount has changed"
        names.own.clear()
        mounts.change()
        async with asyncio.timeout(SECONDS):
            await watching

    with pytest.raises(PortwardError, match="network namespace 'blue' was removed or made anew: this agent ends"):
        asyncio.run(run())
    assert names.looks == 3, "no look without a change"
    assert mounts.closed


def test_a_name_that_was_lost_before_is_seen_without_a_change(names: Names, mounts: Mounts) -> None:
    names.own.clear()
    with pytest.raises(PortwardError, match="was removed or made anew"):
        asyncio.run(namespace_watch.watch("blue"))
    assert mounts.closed


def test_without_news_of_mounts_the_name_is_looked_at_now_and_then(
    names: Names, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> MountChanges:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(namespace_watch, "MountChanges", fails)
    monkeypatch.setattr(namespace_watch, "_INTERVAL_S", 0.01)

    async def run() -> None:
        watching = asyncio.ensure_future(namespace_watch.watch("blue"))
        await until_looked(names, 3)
        names.own.clear()
        async with asyncio.timeout(SECONDS):
            await watching

    with caplog.at_level(logging.WARNING), pytest.raises(PortwardError, match="was removed or made anew"):
        asyncio.run(run())
    assert "changes of mounts cannot be watched ([Errno 24] Too many open files)" in caplog.text


def test_the_hosts_own_agent_watches_no_name(names: Names) -> None:
    async def run() -> None:
        watching = asyncio.ensure_future(namespace_watch.watch(None))
        await asyncio.sleep(0)
        assert not watching.done()
        watching.cancel()

    asyncio.run(run())
    assert names.looks == 0


def test_descriptors_of_a_watch_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 # a number
    for _ in range(3):
        MountChanges().close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 # as above
