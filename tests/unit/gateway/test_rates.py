"""The limits in the kernel are known here, also if a reading misses some."""

from __future__ import annotations

from portward.gateway.learned import Source
from portward.gateway.rates import Bucket, Rates
from portward.gateway.setdump import SetElement

_KEYS = [Source(7, bytes([10, 0, 0, number])).key for number in range(50)]


class Limits:
    """A kernel with sources that draw on a limit, whose first reading of the map misses half of them."""

    readings = 0

    def limits(self) -> list[str]:
        return ["s1-60-5"]

    def elements(self, set_: str) -> list[SetElement]:
        if set_ != "rates4":
            return []
        self.readings += 1
        return [SetElement(key, 0, 0, "s1-60-5") for key in (_KEYS[:25] if self.readings == 1 else _KEYS)]


def test_sources_that_a_reading_misses_are_held_all_the_same() -> None:
    rates = Rates(Limits())  # type: ignore[arg-type] # nothing is written
    rates.read()
    assert {source.key for source in rates.sources()} == set(_KEYS)
    assert rates.bucket(Source.of(_KEYS[49])) == Bucket(1, 60, 5)
