"""What Prometheus would make of the agent's counters: `increase()` over all scrapes, restarts included."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Final

_COUNTED: Final = re.compile(
    r'portward_(?:subscription_)?packets_total\{(?:segment|subscription)="([^"]*)",verdict="([^"]*)"\}'
)


class Ledger:
    """Packets by segment or subscription, and verdict: the sum of what each scrape has more than the one before. A
    counter that is lower than before has begun anew; one that a scrape does not have is compared when it is back,
    as Prometheus does."""

    def __init__(self) -> None:
        self.packets: Counter[tuple[str, str]] = Counter()
        self._last: dict[tuple[str, str], float] = {}

    def scraped(self, metrics: Mapping[str, float]) -> None:
        """Takes a scrape in: metric with its labels → value."""
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
