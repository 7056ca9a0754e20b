"""The job that keeps the ruleset as it was loaded: when there is a reason to look at it, and how often.

A notice about our own tables is a reason to look at once. What other programs change in theirs is one only if it
may turn packets into others, and a program that changes such things all the time must not keep us looking all
the time. Whatever the notices say, the ruleset is looked at every ten seconds (`Keeper`)."""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

from portward.base.clock import monotonic
from portward.daemon.core import Core
from portward.daemon.steps import Step, StepRunner
from portward.daemon.timers import readable, until_tick
from portward.dataplane.monitor import LOST, NOTHING, RulesetChanges

_CHECK_SECONDS: Final = 0.5
# Between two looks, in seconds: somebody who writes our rules all the time must not keep the core from
# everything else.
_PAUSE: Final = 0.01
# After notices of others that are no reason to look, in seconds. What comes meanwhile is read at once: to wake
# for each of 200 changes a second would cost 2 % of a core. A change of ours waits no longer than between two
# looks.
_OTHERS_PAUSE: Final = 0.01
# A look for what others do takes longer the more they have. It is made again after so many times as long as it
# took: if packets may not be judged again yet, and at most this many seconds later; and if only something has
# gone.
_SHARE, _LONGEST_PAUSE = 10, 0.5
_GONE_SHARE, _GONE_PAUSE = 50, 1.0


class Listening(Protocol):
    """What hears of changes (`Notices`)."""

    def fileno(self) -> int:
        """A descriptor that can be read after a change."""

    def read(self) -> RulesetChanges:
        """What has changed since the last time."""


# Runs work on the kernel thread.
OnKernel: TypeAlias = Callable[[Callable[[], None]], Awaitable[None]]


class RulesetWatch:
    """Calls `Core.check` on the kernel thread when there is a reason."""

    def __init__(
        self, core: Core, kernel: OnKernel, notices: tuple[Listening, Listening], steps: StepRunner
    ) -> None:
        """`notices`: what hears of changes of our tables, and what hears of chains and rules of others, too."""
        self._core, self._kernel, self._steps = core, kernel, steps
        self._ours, self._others = notices
        self._owed = NOTHING
        # From when on a reason that is no change of ours counts, by the monotonic clock.
        self._next = self._next_gone = 0.0

    async def run(self) -> None:
        """Never ends."""
        # What was changed between the load and these notices was heard by nobody.
        self._owed = LOST
        with contextlib.closing(select.epoll()) as both:
            both.register(self._ours.fileno(), select.EPOLLIN)
            both.register(self._others.fileno(), 0)
            while True:
                # While the guard is loaded, no chain of others is urgent: they are read at each tick.
                both.modify(self._others.fileno(), 0 if self._core.guarded else select.EPOLLIN)
                await readable(both.fileno(), until_tick(_CHECK_SECONDS))
                await self._take()

    async def _take(self) -> None:
        ours, others = self._ours.read(), self._others.read()
        # What hears of ours alone knows better whether that was lost.
        self._owed |= ours | others._replace(ours=False, lost=False)
        await self._steps.run(Step.RULESET, lambda: self._step(certain=ours.ours and not ours.lost), None)
        if others.others:
            await asyncio.sleep(_OTHERS_PAUSE)

    async def _step(self, *, certain: bool) -> None:
        # After a look that failed half-way, what `at_rest` compares says nothing.
        failed = self._steps.is_failing(Step.RULESET)
        if failed or certain or self._is_due() or not self._core.at_rest(NOTHING):
            await self._look()

    def _is_due(self) -> bool:
        """Whether there is a reason to look now. What the kernel has dropped may be anything: it counts as a
        change of ours, within the limit of the other reasons."""
        now, owed = monotonic(), self._owed
        urgent = owed.lost or (owed.gained and not self._core.guarded)
        return (urgent and now >= self._next) or ((owed.gained or owed.gone) and now >= self._next_gone)

    async def _look(self) -> None:
        self._owed = NOTHING
        began = monotonic()
        await self._kernel(self._core.check)
        now = monotonic()
        self._next = now + min(max(_PAUSE, _SHARE * (now - began)), _LONGEST_PAUSE)
        self._next_gone = now + max(_GONE_PAUSE, _GONE_SHARE * (now - began))
        await asyncio.sleep(_PAUSE)
