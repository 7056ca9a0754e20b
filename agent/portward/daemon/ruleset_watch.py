"""The job that keeps the ruleset as it was loaded: it decides when to check the ruleset, and how often.

A notice about portward's own tables leads to a check at once. A change in tables of other programs leads to one
only if it may translate packets, and a program that makes such changes all the time must not cause a check each
time. Whatever the notices say, the ruleset is looked at every ten seconds (`Keeper`)."""

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

# Without a notice, what `Core.at_rest` compares is looked at twice a second. That costs some microseconds.
_TICK_S: Final = 0.5
# Between two checks, because a program that writes portward's rules all the time must not keep the kernel thread
# from other work.
_PAUSE_S: Final = 0.01
# After notices of other programs. Notices that come meanwhile are read together, because waking for each of 200
# changes a second would cost 2 % of a core. A change of portward's own tables waits no longer than `_PAUSE_S`.
_OTHERS_PAUSE_S: Final = 0.01
# A check takes longer the more rules other programs have. So the next check for their sake comes after 10 times
# the duration of the last one, at most 0.5 s, if packets may be translated unseen …
_SHARE, _MAX_PAUSE_S = 10, 0.5
# … and after 50 times, at least 1 s, if rules were only removed: then the guard is loaded without need.
_GONE_SHARE, _GONE_PAUSE_S = 50, 1.0


class NoticeSource(Protocol):
    """A source of notices about changes of the ruleset."""

    def fileno(self) -> int:
        """A descriptor that is readable after a change."""

    def read(self) -> RulesetChanges:
        """The changes since the last call."""


# Runs work on the kernel thread.
OnKernel: TypeAlias = Callable[[Callable[[], None]], Awaitable[None]]


class RulesetWatch:
    """Calls `Dataplane.check` on the kernel thread when there is a reason."""

    def __init__(
        self, core: Core, kernel: OnKernel, notices: tuple[NoticeSource, NoticeSource], steps: StepRunner
    ) -> None:
        """`notices`: one source for changes of portward's tables, and one that also has chains and rules of other
        programs."""
        self._core, self._kernel, self._steps = core, kernel, steps
        self._ours, self._others = notices
        self._unchecked = NOTHING
        # When changes of other programs may next lead to a check (monotonic, s).
        self._next = self._next_gone = 0.0

    async def run(self) -> None:
        """Never returns."""
        # A change between the load of the ruleset and the first notice was not reported.
        self._unchecked = LOST
        with contextlib.closing(select.epoll()) as both:
            both.register(self._ours.fileno(), select.EPOLLIN)
            both.register(self._others.fileno(), 0)
            while True:
                # While the guard is loaded, no chain of other programs is urgent. They are read at each tick.
                both.modify(self._others.fileno(), 0 if self._core.dataplane.guarded else select.EPOLLIN)
                await readable(both.fileno(), until_tick(_TICK_S))
                await self._take()

    async def _take(self) -> None:
        ours, others = self._ours.read(), self._others.read()
        # The source for portward's tables alone knows better whether notices about them were lost.
        self._unchecked |= ours | others._replace(ours=False, lost=False)
        await self._steps.run(Step.RULESET, lambda: self._step(certain=ours.ours and not ours.lost), None)
        if others.others:
            await asyncio.sleep(_OTHERS_PAUSE_S)

    async def _step(self, *, certain: bool) -> None:
        # After a check that failed half-way, `at_rest` compares with an incomplete state.
        failed = self._steps.is_failing(Step.RULESET)
        if failed or certain or self._is_due() or not self._core.at_rest(NOTHING):
            await self._check()

    def _is_due(self) -> bool:
        """Whether changes of other programs, or lost notices, lead to a check now. A lost notice may be about a
        change of portward's tables, so it is urgent, but it waits for its time like the others."""
        now, changes = monotonic(), self._unchecked
        urgent = changes.lost or (changes.gained and not self._core.dataplane.guarded)
        return (urgent and now >= self._next) or ((changes.gained or changes.gone) and now >= self._next_gone)

    async def _check(self) -> None:
        self._unchecked = NOTHING
        began = monotonic()
        await self._kernel(self._core.dataplane.check)
        now = monotonic()
        self._next = now + min(max(_PAUSE_S, _SHARE * (now - began)), _MAX_PAUSE_S)
        self._next_gone = now + max(_GONE_PAUSE_S, _GONE_SHARE * (now - began))
        await asyncio.sleep(_PAUSE_S)
