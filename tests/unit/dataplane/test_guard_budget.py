"""The number of verdicts that the forward guard may add to the cached verdicts of a segment."""

from __future__ import annotations

from portward.config.keys import Verdicts
from portward.dataplane.sources import GuardBudget

VERDICTS = Verdicts(segment_sources=80, allow_seconds=60, deny_seconds=30)


def test_a_segment_gets_an_eighth_of_its_share_in_the_time_that_a_verdict_lives() -> None:
    now = 0.0
    budget = GuardBudget(lambda: now)
    assert [budget.take(1, VERDICTS) for _ in range(12)] == [True] * 10 + [False] * 2
    assert budget.take(2, VERDICTS), "another segment has a share of its own"
    now = 59.0
    assert not budget.take(1, VERDICTS)
    now = 61.0
    assert [budget.take(1, VERDICTS) for _ in range(12)] == [True] * 10 + [False] * 2


def test_the_smallest_share_has_room_for_one() -> None:
    budget = GuardBudget()
    assert [budget.take(1, Verdicts(segment_sources=16)) for _ in range(3)] == [True, True, False]
