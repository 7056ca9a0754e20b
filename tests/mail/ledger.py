"""The agent's counters as Prometheus adds them up: `increase()` over all scrapes, also across restarts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Final

_COUNTED: Final = re.compile(
    r'portward_(?:subscription_)?packets_total\{(?:segment|subscription)="([^"]*)",verdict="([^"]*)"\}'
)


class Ledger:
    """Packets by segment or subscription and verdict: the sum of the increases from scrape to scrape. As in
    Prometheus, a counter that is lower than before has started again at 0. If a counter is missing in a scrape,
    its next value is compared with the last one."""

    def __init__(self) -> None:
        self.packets: Counter[tuple[str, str]] = Counter()
        self._last: dict[tuple[str, str], float] = {}

    def scraped(self, metrics: Mapping[str, float]) -> None:
        """Adds a scrape: metric with its labels → value."""
        now = {
            (found[1], found[2]): value for name, value in metrics.items() if (found := _COUNTED.fullmatch(name))
        }
        for key, value in now.items():
            before = self._last.get(key, 0)
            self.packets[key] += int(value - before if value >= before else value)
        self._last |= now

    def of(self, owner: str) -> int:
        """All packets of a segment or subscription."""
        return sum(self.by_verdict(owner).values())

    def by_verdict(self, owner: str) -> dict[str, int]:
        """The same by verdict."""
        return {verdict: packets for (of, verdict), packets in self.packets.items() if of == owner and packets}
