"""The results of the self-check: differences between what the kernel should enforce and what it enforces.

`plane` and the daemon make the comparisons and report the results here.
"""

from __future__ import annotations

import logging
from collections import Counter
from enum import StrEnum
from typing import Final

from portward.base import clock
from portward.base.words import utc_as_typed

# A worker that has not answered in this time, and has handled no packet either, is taken for hung.
ANSWER_TIMEOUT_S: Final = 2.0
# From the end of one round of queries to the beginning of the next.
PAUSE_S: Final = 2.0
# At each reading of the cached verdicts, this many that let packets pass and as many that stop packets are
# compared with the policy table.
SAMPLE_SOURCES: Final = 1_000

_log = logging.getLogger("portward.dataplane.selfcheck")


class DifferenceKind(StrEnum):
    """The kinds of differences. The values are labels of a metric."""

    RULESET = "ruleset"  # Rules, sets or queue rules are not the loaded ones, or the epoch is another one.
    CACHED = "remembered"  # The kernel has cached a verdict that is not the policy table's.
    WORKER = "worker"  # A worker does not answer a query in its queue.
    ANSWER = "answer"  # Workers answer, but not under the policy that the kernel enforces.


class SelfCheck:
    """The differences since the start of the agent."""

    def __init__(self) -> None:
        self.divergences: Counter[DifferenceKind] = Counter(dict.fromkeys(DifferenceKind, 0))
        # When all workers last answered, by `clock.monotonic`; None before the first time.
        self.answered: float | None = None
        self._logged = ""
        # When the last difference was found, by the same clock, and its text.
        self._last: tuple[float, str] | None = None

    def differs(self, kind: DifferenceKind, what: str) -> None:
        """Counts and logs a difference. `what` says what was found and what is done about it. If it is the same
        text as the last time, it is only counted."""
        self.divergences[kind] += 1
        if what != self._logged:
            _log.error("%s", what)
        self._logged = what
        self._last = clock.monotonic(), f"{kind}: {what}"

    def well(self) -> None:
        """Takes note that all workers have answered under the policy that the kernel enforces."""
        self.answered = clock.monotonic()

    @property
    def last_difference(self) -> str:
        """The last difference with its time in UTC, by the wall clock as it is set now; empty if there was
        none."""
        if self._last is None:
            return ""
        return f"{utc_as_typed(clock.at(self._last[0]))} {self._last[1]}"
