"""What the self-check has found: differences between what should be enforced and what is, by kind, and when
all was last seen to be well. The comparing is done where the things are: `core`, `daemon`."""

from __future__ import annotations

import logging
from collections import Counter
from enum import StrEnum
from typing import Final

from portward.base import clock

# An answer that does not come in so many seconds, while nothing else is handled either, will not come.
PATIENCE: Final = 2.0
# Between the ends of one round of queries and the beginning of the next, in seconds.
PAUSE: Final = 2.0
# Each time the remembered verdicts are read, so many that pass and as many that stop are compared with the table.
SAMPLE_SOURCES: Final = 1_000

_log = logging.getLogger("portward.dataplane.selfcheck")


class DifferenceKind(StrEnum):
    """What differs."""

    RULESET = "ruleset"  # rules, sets or queue rules are not those that were loaded, or the epoch is another
    CACHED = "remembered"  # the kernel remembers a verdict that the table does not give
    WORKER = "worker"  # a worker does not answer its queue
    ANSWER = "answer"  # workers answer, but not under the policy that the kernel has


class SelfCheck:
    """Differences found so far."""

    def __init__(self) -> None:
        self.divergences: Counter[DifferenceKind] = Counter(dict.fromkeys(DifferenceKind, 0))
        # When every worker last answered, by `clock.monotonic`; None: not yet.
        self.answered: float | None = None
        self._what = ""
        # The last difference, and when it was found, by the same clock.
        self._last: tuple[float, str] | None = None

    def differs(self, kind: DifferenceKind, what: str) -> None:
        """Counts and logs a difference; `what` says what was found and what is done about it. The same one again
        is only counted."""
        self.divergences[kind] += 1
        if what != self._what:
            _log.error("%s", what)
        self._what = what
        self._last = clock.monotonic(), f"{kind}: {what}"

    def well(self) -> None:
        """All workers have answered under the policy that the kernel has."""
        self.answered = clock.monotonic()

    @property
    def last_difference(self) -> str:
        """The last difference with its time, by the wall clock as it is set now; empty if there was none."""
        if self._last is None:
            return ""
        return f"{clock.at(self._last[0]):%Y-%m-%dT%H:%M:%SZ} {self._last[1]}"
