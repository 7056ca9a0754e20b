"""How many verdicts the daemon writes into the learned sets for the forward guard: no segment may fill them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from portward.config.keys import Verdicts

# Of a segment's share of a set, which packets fill by themselves, the guard may add one part in so many.
_PART: Final = 8


class GuardBudget:
    """Counts what is written for each interface in the time that a verdict lives."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        # Interface index → when its time began, and what was written since.
        self._written: dict[int, tuple[float, int]] = {}

    def take(self, link: int, verdicts: Verdicts) -> bool:
        """Whether one more verdict may be written for this interface; if so, it is counted."""
        now, most = self._clock(), max(1, verdicts.segment_sources // _PART)
        began, written = self._written.get(link, (now, 0))
        if now - began > max(verdicts.allow_seconds, verdicts.deny_seconds):
            began, written = now, 0
        if written >= most:
            return False
        self._written[link] = began, written + 1
        return True
