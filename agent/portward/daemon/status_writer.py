"""The job that refreshes metrics and status once a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from portward.daemon.core import Core
from portward.daemon.metrics import MetricsCollector
from portward.daemon.runtime import Runtime
from portward.daemon.status import status
from portward.daemon.steps import Step, StepRunner
from portward.daemon.threads import Threads
from portward.daemon.timers import until_tick

# Prometheus scrapes every 15 s or so, and `portward status` calls a status older than 5 s late.
_STATUS_S: Final = 1.0
# Once the policy thread has been at one step for this long, a warning is logged; again each time that it doubles.
_SLOW_S: Final = 10.0

_log = logging.getLogger("portward")


class StatusWriter:
    """Reads the metrics and writes the status file, on the counting thread."""

    def __init__(
        self,
        path: Path,
        core: Core,
        collector: MetricsCollector,
        runtime: Runtime,
        reload_failed: Callable[[], bool],
        began: float,
    ) -> None:
        """`path` is that of the configuration. `began` is when the agent started, by `clock.monotonic`."""
        self._path, self._core, self._collector, self._runtime = path, core, collector, runtime
        self._reload_failed = reload_failed
        self._began = began
        # Seconds at one step from which the next warning is due.
        self._warn_from = _SLOW_S

    async def run(self, threads: Threads, steps: StepRunner) -> None:
        """Never returns."""
        while True:
            await steps.run(Step.STATUS, lambda: threads.counting(self._write), None)
            await asyncio.sleep(until_tick(_STATUS_S))

    def _write(self) -> None:
        self._warn_if_slow()
        reading, numbers = self._collector.refresh(reload_failed=self._reload_failed())
        document = status(reading, numbers, config=str(self._path), began=self._began)
        # A full disk must not stop enforcement. The reader sees how old the status is.
        with contextlib.suppress(OSError):
            self._runtime.write_status(document)

    def _warn_if_slow(self) -> None:
        """Logs that the policy thread has been at one step for long. Enforcement goes on, but changes wait."""
        work = self._core.work
        if work is None or work.seconds() < _SLOW_S:
            self._warn_from = _SLOW_S
        elif work.seconds() >= self._warn_from:
            _log.warning(
                "%s has been going on for %.0f s: changes of policy wait, the last known policy stays in force",
                work.what, work.seconds(),
            )  # fmt: skip
            self._warn_from = 2 * work.seconds()
