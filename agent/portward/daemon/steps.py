"""Runs the daemon's repeated work so that one unexpected error does not end the agent.

A *step* is a piece of work with a name. If it raises, the error is logged with its traceback, counted, and shown
in `status`. The step is retried after a pause that doubles from 1 s to 60 s. After a success the pause is 1 s
again. Meanwhile the other steps go on.

A failed step opens nothing. A change is one transaction of the table, so the table has all of it or nothing. If a
change is committed but not enforced, the check of the ruleset finds that.

A *vital* step closes what must be closed: grants that end, the ruleset, interfaces with another owner. If a vital
step fails `VITAL_TRIES` times in a row, its error ends the agent. Then a new process starts from a known state, or
the workers end and every new packet is dropped.

A `TableError` ends the agent at once, because the policy table cannot be read. The next start puts that table
aside.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from portward.base.clock import monotonic
from portward.errors import printable
from portward.table.database import TableError

_T = TypeVar("_T")

# The pause before the first retry, and the longest pause.
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
# A vital step may fail this many times in a row. The last failure comes 1 + 2 + 4 + 8 = 15 s after the first.
VITAL_TRIES: Final = 5
# An error in `status` is cut to this many characters, so that a line stays readable.
_MAX_ERROR_CHARACTERS: Final = 300

_log = logging.getLogger("portward")


class Step(StrEnum):
    """The steps. Their values are fixed, because they are label values of a metric."""

    STORE = "store"  # read the store into the policy table.
    SETTLE = "settle"  # end grants.
    LINKS = "links"  # write interfaces into the policy table.
    DEVICES = "devices"  # pass changes of interfaces to the kernel thread.
    OWNERS = "owners"  # drop packets of interfaces with another owner until the table has it.
    INTERFACES = "interfaces"  # read the kernel's messages about interfaces.
    RULESET = "ruleset"  # check the ruleset, and repair it.
    CUSTODIAN = "custodian"  # see to it that the table has a custodian.
    COUNT = "count"  # read the kernel's counters.
    COMPARE = "compare"  # compare cached verdicts with the table.
    RATES = "rates"  # bring the kernel's rate limits in line with the table.
    LIMITS = "limits"  # install rate limits for which workers have asked.
    STATUS = "status"  # refresh status and metrics.
    SELF_CHECK = "self-check"  # query the workers.
    WORKER = "worker"  # watch a worker process.
    RELOAD = "reload"  # put a changed configuration in force; retried only if an operator asks again.


_VITAL: Final = frozenset({Step.SETTLE, Step.DEVICES, Step.OWNERS, Step.RULESET})


@dataclass
class _Failing:
    """A step that failed the last time: how often in a row, since when, and when it is retried (monotonic, s)."""

    error: str
    since: float
    times: int = 0
    again: float = 0.0


class StepRunner:
    """Runs the steps of one daemon, on the event loop. Any thread may read `failures` and call `failing_now`."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self.failures: dict[Step, int] = dict.fromkeys(Step, 0)
        self._failing: dict[Step, _Failing] = {}

    def is_failing(self, step: Step) -> bool:
        """Whether the last run of the step failed."""
        return step in self._failing

    def seconds_to_retry(self, step: Step) -> float:
        """Seconds until the step may run again; 0 if it may run now."""
        found = self._failing.get(step)
        return 0.0 if found is None else max(0.0, found.again - self._clock())

    def failing_now(self) -> list[dict[str, Any]]:
        """The steps that fail now, for `status`. `seconds` is the time since the first failure in a row."""
        now = self._clock()
        return [
            {"step": step.value, "error": found.error, "times": found.times, "seconds": now - found.since}
            for step, found in list(self._failing.items())
        ]

    async def run(
        self, step: Step, work: Callable[[], Awaitable[_T]], otherwise: _T, *, anyway: bool = False
    ) -> _T:
        """Runs a step and returns its result. Returns `otherwise` if it fails, or still waits after a failure.

        With `anyway` it does not wait. Raises TableError, and the error of a vital step's last try.
        """
        if self.seconds_to_retry(step) and not anyway:
            return otherwise
        try:
            found = await work()
        except Exception as error:
            self.record_failure(step, error)
            return otherwise
        self.record_success(step)
        return found

    async def keep_running(self, step: Step, job: Callable[[], Awaitable[None]]) -> None:
        """Runs a job that never returns. If it fails, it starts again after the pause of its step. The step counts
        as working again once the job has run for as long as that pause, unless the step has failed meanwhile."""
        while True:
            running = asyncio.ensure_future(job())
            try:
                if self.is_failing(step):
                    before = self.failures[step]
                    await asyncio.wait({running}, timeout=self._pause(step))
                    if not running.done() and self.failures[step] == before:
                        self.record_success(step)
                await running
                return
            except Exception as error:
                self.record_failure(step, error)
            finally:
                running.cancel()  # has an effect only if this task is being cancelled
                await asyncio.wait({running})
            await asyncio.sleep(self.seconds_to_retry(step))

    def record_failure(self, step: Step, error: Exception) -> None:
        """Records a failure. Raises the error if it must end the agent."""
        if isinstance(error, TableError):
            raise error
        self.failures[step] += 1
        text, now = _described(error), self._clock()
        found = self._failing.setdefault(step, _Failing("", now))
        new = text != found.error
        found.error, found.times = text, found.times + 1
        pause = self._pause(step)
        found.again = now + pause
        if step in _VITAL and found.times >= VITAL_TRIES:
            _log.critical("step %s failed %d times in a row: the agent ends", step, found.times)
            raise error
        again = "at the next reload" if step is Step.RELOAD else f"after {pause:g} s"
        _log.error(
            "step %s failed and is retried %s; the other steps go on: %s",
            step, again, text, exc_info=error if new else None,
        )  # fmt: skip

    def record_success(self, step: Step) -> None:
        """Records a success."""
        found = self._failing.pop(step, None)
        if found is not None:
            _log.warning("step %s works again, after %d failures", step, found.times)

    def _pause(self, step: Step) -> float:
        times = self._failing[step].times
        return float(min(FIRST_PAUSE_S * 2 ** min(times - 1, 10), LONGEST_PAUSE_S))


def _described(error: Exception) -> str:
    """The type of an error, its text, and the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARACTERS]) + place
