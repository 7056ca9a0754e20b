"""Errors that nobody expects, in what the daemon does again and again: one step that fails must not end the agent.

A *step* is a piece of work with a name. If it raises, that is logged with its traceback, counted and shown in
`status`; the step is tried again after a pause that doubles from 1 s to 60 s, and begins at 1 s again after a
success. The other steps go on meanwhile.

Nothing opens by that: a change is one transaction of the table, so a step that fails leaves the table as it was
before or after; and what is committed and not carried out is found by the check of the ruleset. But a *vital* step
keeps closed what has to be closed (ends of grants, the ruleset, interfaces with another owner). If a vital step
fails `VITAL_TRIES` times in a row, some 15 s, its error ends the agent: a new process begins from a state that is
known, or the workers end and everything new is dropped.

A `TableError` ends the agent at once: the policy table cannot be read, and the next start puts it aside.
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

# Seconds until a step that failed is tried again: the first time, and at most.
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
# Failures of a vital step in a row: the last one comes 1 + 2 + 4 + 8 s after the first.
VITAL_TRIES: Final = 5
# Characters of an error in `status`.
_LONGEST_ERROR: Final = 300

_log = logging.getLogger("portward")


class Step(StrEnum):
    """The steps. Fixed: they are labels of a metric."""

    STORE = "store"  # taking in what the store has
    SETTLE = "settle"  # ends of grants
    LINKS = "links"  # interfaces into the policy table
    DEVICES = "devices"  # interfaces as the kernel thread needs to know them
    OWNERS = "owners"  # interfaces with another owner, whose packets are dropped until the table knows it
    INTERFACES = "interfaces"  # reading what the kernel says of interfaces
    RULESET = "ruleset"  # looking at the ruleset, and putting it back
    COUNT = "count"  # reading what the kernel has counted
    COMPARE = "compare"  # cached verdicts against the table
    RATES = "rates"  # rate limits in the kernel, in line with the table
    LIMITS = "limits"  # rate limits of sources that workers have met
    STATUS = "status"  # status and metrics
    SELF_CHECK = "self-check"  # queries to the workers
    WORKER = "worker"  # watching worker processes
    RELOAD = "reload"  # another configuration; tried when an operator asks for it, and at no other time


_VITAL: Final = frozenset({Step.SETTLE, Step.DEVICES, Step.OWNERS, Step.RULESET})


@dataclass
class _Failing:
    """A step that failed the last time: how often in a row, since when, and when it is tried again (monotonic)."""

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
        """Whether the step failed when it was last tried."""
        return step in self._failing

    def seconds_to_retry(self, step: Step) -> float:
        """Seconds until the step may be tried again; 0 if it may be now."""
        found = self._failing.get(step)
        return 0.0 if found is None else max(0.0, found.again - self._clock())

    def failing_now(self) -> list[dict[str, Any]]:
        """For `status`: the steps that fail now, with ages in seconds."""
        now = self._clock()
        return [
            {"step": step.value, "error": found.error, "times": found.times, "seconds": now - found.since}
            for step, found in list(self._failing.items())
        ]

    async def run(
        self, step: Step, work: Callable[[], Awaitable[_T]], otherwise: _T, *, anyway: bool = False
    ) -> _T:
        """Runs a step, unless it is still to wait after a failure (`anyway`: also then). Gives what it gives, or
        `otherwise` if it failed or waits. Raises TableError, and what a vital step raised at the last try."""
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
        """Runs a job that never ends; one that fails begins anew after its pause. It counts as working again once
        it has run for as long as that pause was, unless its own step has failed meanwhile."""
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
                running.cancel()  # if this job was cancelled
                await asyncio.wait({running})
            await asyncio.sleep(self.seconds_to_retry(step))

    def record_failure(self, step: Step, error: Exception) -> None:
        """Notes a failure. Raises it if it is to end the agent."""
        if isinstance(error, TableError):
            raise error
        self.failures[step] += 1
        told, now = _in_words(error), self._clock()
        found = self._failing.setdefault(step, _Failing("", now))
        new = told != found.error
        found.error, found.times = told, found.times + 1
        pause = self._pause(step)
        found.again = now + pause
        if step in _VITAL and found.times >= VITAL_TRIES:
            _log.critical("step %s failed %d times in a row: the agent ends", step, found.times)
            raise error
        again = "at the next one" if step is Step.RELOAD else f"after {pause:g} s"
        _log.error(
            "step %s failed, and is tried again %s; the rest goes on: %s",
            step, again, told, exc_info=error if new else None,
        )  # fmt: skip

    def record_success(self, step: Step) -> None:
        """Notes a success."""
        found = self._failing.pop(step, None)
        if found is not None:
            _log.warning("step %s works again, after %d failures", step, found.times)

    def _pause(self, step: Step) -> float:
        times = self._failing[step].times
        return float(min(FIRST_PAUSE_S * 2 ** min(times - 1, 10), LONGEST_PAUSE_S))


def _in_words(error: Exception) -> str:
    """The kind of an error, its text, and the line of portward that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]) + place
