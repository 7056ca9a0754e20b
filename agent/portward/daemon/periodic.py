"""Periodic jobs: reading the kernel's counters, comparing cached verdicts with the table, installing rate
limits."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from portward.daemon.core import Core
from portward.daemon.steps import Step, StepRunner
from portward.daemon.threads import Threads
from portward.daemon.timers import until_tick
from portward.dataplane.verdict_cache import Source

# Counters are read once a second. If the sets are large, the pause is 19 times as long as a reading, so that it
# takes a twentieth of a core, but at most 5 s …
_COUNT_S: Final = 1.0
_COUNT_SHARE: Final = 19.0
_MAX_COUNT_PAUSE_S: Final = 5.0
# … unless that would take more than a quarter of a core, because reading half a million counters takes seconds.
_MIN_COUNT_SHARE: Final = 3.0
# How often cached verdicts and rate limits are compared with the table.
_COMPARE_S: Final = 5.0
# This many limits are installed at once, at about 10 µs each, and then there is a pause for other work of the
# kernel thread.
_MAX_LIMIT_REQUESTS: Final = 256
_LIMIT_PAUSE_S: Final = 0.05


class PeriodicJobs:
    """`count` and `install_limits` are jobs that run side by side and never return."""

    def __init__(self, core: Core, threads: Threads, steps: StepRunner, limit_requests: LimitRequests) -> None:
        """`limit_requests` are filled by the workers."""
        self._core, self._threads, self._steps, self._limit_requests = core, threads, steps, limit_requests
        # Seconds between two readings of the counters.
        self._pause = _COUNT_S

    async def count(self) -> None:
        """Reads the kernel's counters, and brings cached verdicts and rate limits in line with the table."""
        run, core, threads = self._steps.run, self._core, self._threads
        compare_at = time.monotonic()
        while True:
            began = time.monotonic()
            await run(Step.COUNT, self._count, None)
            took = time.monotonic() - began
            if began >= compare_at:
                compare_at = began + _COMPARE_S - _COUNT_S / 2
                await run(Step.COMPARE, self._compare, None)
                await run(Step.RATES, lambda: threads.kernel(core.dataplane.sync_rate_limits), None)
            self._pause = max(min(_COUNT_SHARE * took, _MAX_COUNT_PAUSE_S), _MIN_COUNT_SHARE * took, _COUNT_S)
            await asyncio.sleep(max(until_tick(_COUNT_S), self._pause - _COUNT_S / 2))

    async def _count(self) -> None:
        due = await self._threads.counting(lambda: self._core.count(self._pause))
        if due:
            await self._threads.kernel(lambda: self._core.dataplane.delete_expiring(due))

    async def _compare(self) -> None:
        if suspects := await self._threads.counting(self._core.counting.suspects):
            await self._threads.kernel(lambda: self._core.dataplane.correct(suspects))

    async def install_limits(self) -> None:
        """Installs the rate limits for which workers have asked, some hundred at a time, because a tenant with a
        large prefix can use any number of sources. If the step fails, the next packet of a source asks again."""
        while True:
            await self._take(await self._limit_requests.take())
            await asyncio.sleep(_LIMIT_PAUSE_S)

    async def _take(self, batch: list[Source]) -> None:
        await self._steps.run(
            Step.LIMITS, lambda: self._threads.kernel(lambda: self._core.dataplane.install_limits(batch)), None
        )


class LimitRequests:
    """Sources that may send within a rate limit that the kernel does not have yet, as the workers report them."""

    def __init__(self) -> None:
        self._sources: dict[Source, None] = {}
        self._any = asyncio.Event()

    def add(self, source: Source) -> None:
        """Adds a source. If there are too many, the source is ignored; its next packet asks again."""
        if len(self._sources) < _MAX_LIMIT_REQUESTS:
            self._sources[source] = None
            self._any.set()

    async def take(self) -> list[Source]:
        """Returns and removes all sources; waits until there is one."""
        await self._any.wait()
        batch = list(self._sources)
        self._sources.clear()
        self._any.clear()
        return batch
