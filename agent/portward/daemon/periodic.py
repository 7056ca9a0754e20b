"""Jobs of the daemon that come round again and again: counting what the kernel has seen, comparing cached verdicts
with the table, and rate limits.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from portward.daemon.core import Core
from portward.daemon.steps import Step, StepRunner
from portward.daemon.threads import Threads
from portward.daemon.timers import until_tick
from portward.dataplane.verdict_cache import Source

_COUNT_SECONDS: Final = 1.0
# Sets with many elements are read less often, for a twentieth of a core, but at least each five seconds …
_COUNT_SHARE: Final = 19.0
_COUNT_LONGEST: Final = 5.0
# … unless that takes more than a quarter of a core: to read half a million counters takes seconds.
_COUNT_REST: Final = 3.0
# How often cached verdicts and rate limits are compared with the table.
_COMPARE_SECONDS: Final = 5.0
# So many sources with a limit are taken in at once, and then there is a pause, in seconds: each costs some 10 µs.
_UNRATED: Final = 256
_RATE_PAUSE: Final = 0.05


class PeriodicJobs:
    """`count` and `install_limits` run side by side and never end."""

    def __init__(self, core: Core, threads: Threads, steps: StepRunner, limit_requests: LimitRequests) -> None:
        """`limit_requests` are the sources whose limit the kernel does not know."""
        self._core, self._threads, self._steps, self._limit_requests = core, threads, steps, limit_requests
        # Seconds from one reading of the counters to the next.
        self._pause = _COUNT_SECONDS

    async def count(self) -> None:
        """Reads what the kernel has counted, and brings cached verdicts and rate limits in line with the table."""
        run, core, threads = self._steps.run, self._core, self._threads
        compare_at = time.monotonic()
        while True:
            began = time.monotonic()
            await run(Step.COUNT, self._count, None)
            took = time.monotonic() - began
            if began >= compare_at:
                compare_at = began + _COMPARE_SECONDS - _COUNT_SECONDS / 2
                await run(Step.COMPARE, self._compare, None)
                await run(Step.RATES, lambda: threads.kernel(core.keep_rates), None)
            self._pause = max(min(_COUNT_SHARE * took, _COUNT_LONGEST), _COUNT_REST * took, _COUNT_SECONDS)
            await asyncio.sleep(max(until_tick(_COUNT_SECONDS), self._pause - _COUNT_SECONDS / 2))

    async def _count(self) -> None:
        due = await self._threads.counting(lambda: self._core.count(self._pause))
        if due:
            await self._threads.kernel(lambda: self._core.end(due))

    async def _compare(self) -> None:
        if suspects := await self._threads.counting(self._core.suspects):
            await self._threads.kernel(lambda: self._core.correct(suspects))

    async def install_limits(self) -> None:
        """Brings the limits of sources that workers have met into the kernel, some hundred of them at a time: who
        has a large prefix can make up as many as he likes. Sources whose step fails are met again."""
        while True:
            await self._take(await self._limit_requests.take())
            await asyncio.sleep(_RATE_PAUSE)

    async def _take(self, batch: list[Source]) -> None:
        await self._steps.run(Step.LIMITS, lambda: self._threads.kernel(lambda: self._core.asked(batch)), None)


class LimitRequests:
    """Sources whose limit the kernel does not know, as workers have met them."""

    def __init__(self) -> None:
        self._sources: dict[Source, None] = {}
        self._any = asyncio.Event()

    def add(self, source: Source) -> None:
        """A worker has met this one. Beyond some hundred, a source is met again by its next packet."""
        if len(self._sources) < _UNRATED:
            self._sources[source] = None
            self._any.set()

    async def take(self) -> list[Source]:
        """Those that were met since the last time; waits until there is one."""
        await self._any.wait()
        batch = list(self._sources)
        self._sources.clear()
        self._any.clear()
        return batch
