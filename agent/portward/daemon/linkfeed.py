"""Brings changes of network interfaces into the policy table, and closes interfaces until the table has them.

A new interface is not in the table yet, so its packets are dropped. But the index of an interface that was removed
or renamed may already belong to another tenant's interface, and the table would give it the old tenant's verdicts.
The kernel also acts on the old tenant's cached verdicts until they are deleted. If the table is busy, for example
with a bulk change of some seconds, the kernel thread therefore drops packets of such an index at once, until the
table has its new owner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Final

from portward.daemon.core import Core
from portward.daemon.steps import Step, StepRunner
from portward.daemon.threads import Threads
from portward.dataplane.links import Links, only_ports

# An idle table takes a change of interfaces within some milliseconds, most of them to sync the disk. If it takes
# longer than this, the kernel thread closes the interfaces.
_PATIENCE_S: Final = 0.01


class LinkFeed:
    """Follows interfaces. `follow`, `see`, `write` and `close_uncertain` are jobs that run side by side and never
    return."""

    def __init__(self, core: Core, threads: Threads, steps: StepRunner, first: Links) -> None:
        """`first` are the interfaces that the table has already."""
        self._core, self._threads, self._steps = core, threads, steps
        self._seen = self._due = first
        self._new, self._changed, self._wrote = asyncio.Event(), asyncio.Event(), asyncio.Event()
        # Changes are numbered from 1. The table has all up to `_written`.
        self._number = self._written = 0
        # Indexes that may have another owner than the table says.
        self._uncertain: set[int] = set()
        self._doubt = asyncio.Event()

    async def follow(self, links: AsyncIterator[Links]) -> None:
        """Records each change when it comes, however long the table takes for the one before."""
        async for change in links:
            self._number += 1
            self._uncertain |= in_doubt(self._seen, change, self._core.dataplane.config.segment)
            self._seen = change
            self._due = change._replace(touched=self._due.touched | change.touched)
            self._new.set()
            self._changed.set()
            if self._uncertain:
                self._doubt.set()

    async def see(self) -> None:
        """Passes each change to the kernel thread, whatever the table does."""
        while True:
            await self._new.wait()
            self._new.clear()
            if not await self._on_kernel(Step.DEVICES, lambda: self._core.dataplane.links_seen(self._seen)):
                self._new.set()

    async def write(self) -> None:
        """Writes changes into the table; those that come while it writes are written together."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            due, number = self._due, self._number
            self._due = due._replace(touched=frozenset())
            if await self._write(due, number):
                self._written = number
                self._wrote.set()

    async def _write(self, due: Links, number: int) -> bool:
        """Whether the table took the change. If not, `Intake.retry_links` retries it, so that newer changes do not
        wait."""
        step = lambda: self._core.intake.links_changed(due, number)  # noqa: E731 # for a thread
        return await self._steps.run(Step.LINKS, lambda: self._threads.policy(step), otherwise=False, anyway=True)

    async def _on_kernel(self, step: Step, work: Callable[[], None]) -> bool:
        """Whether a step on the kernel thread succeeded. If not, returns when the step may be retried."""

        async def done() -> bool:
            await self._threads.kernel(work)
            return True

        worked = await self._steps.run(step, done, otherwise=False, anyway=True)
        await asyncio.sleep(self._steps.seconds_to_retry(step))
        return worked

    async def close_uncertain(self) -> None:
        """If the table is busy, makes the kernel drop packets of interfaces that the table takes for others."""
        while True:
            await self._doubt.wait()
            self._doubt.clear()
            indexes, number = frozenset(self._uncertain), self._number
            self._uncertain.clear()
            if not await self._is_written(number):
                await self._unsettle(indexes, number)

    async def _unsettle(self, indexes: frozenset[int], number: int) -> None:
        if not await self._on_kernel(Step.OWNERS, lambda: self._core.dataplane.unsettle(indexes, number)):
            self._uncertain |= indexes
            self._doubt.set()

    async def _is_written(self, number: int) -> bool:
        """Whether the table has all changes up to `number`. If the table is not busy, waits up to
        `_PATIENCE_S`."""
        work = self._core.work
        if work is None or work.seconds() < _PATIENCE_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    while self._written < number:
                        await self._wrote.wait()
                        self._wrote.clear()
        return self._written >= number


async def followed(
    links: AsyncIterator[Links], again: Callable[[], AsyncGenerator[Links]], steps: StepRunner
) -> AsyncIterator[Links]:
    """The changes of interfaces from `links`; after an error, those from `again()`, which starts with all
    interfaces. Changes in between are unknown, so each of these may have taken the index of another
    interface."""
    source: AsyncIterator[Links] = links
    while True:
        try:
            async for change in source:
                yield change
                steps.record_success(Step.INTERFACES)
        except Exception as error:
            steps.record_failure(Step.INTERFACES, error)
        await asyncio.sleep(steps.seconds_to_retry(Step.INTERFACES))
        source = _from_the_start(again())


async def _from_the_start(links: AsyncGenerator[Links]) -> AsyncIterator[Links]:
    async with contextlib.aclosing(links):
        first = await anext(links)
        yield first._replace(touched=first.touched | frozenset(first.names))
        async for change in links:
            yield change


def in_doubt(before: Links, after: Links, is_segment: Callable[[str], bool]) -> set[int]:
    """The indexes for which the table has the verdicts of another interface: indexes of segments, and of VRFs
    whose only port has changed, because the table has the port's entries for the VRF, too."""
    reused = {index for index in after.touched if is_segment(before.names.get(index, ""))}
    had, has = (
        only_ports(links, [index for index, name in links.names.items() if is_segment(name)])
        for links in (before, after)
    )
    return reused | {master for master, port in had.items() if has.get(master) != port or port in reused}
