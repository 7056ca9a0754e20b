"""Every kind of fault once. What must hold is `Outcome.violations`; the long form is `python -m tests.faults`."""

from __future__ import annotations

import pytest

from faults.faults import FAULTS
from faults.ground import Ground


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_leaks_is_wrong_afterwards_or_is_lost(ground: Ground, name: str) -> None:
    for outcome in FAULTS[name](ground, 1):
        assert not outcome.violations, outcome


def test_what_leaks_is_seen(ground: Ground) -> None:
    ground.agents.stop()
    with ground.traffic.measured() as figures:
        ground.nft("delete table inet portward")
        ground.sent_for(0.2)
        ground.agents.start()
        ground.recovered()
    assert len(figures.leaked) > 10
    assert not ground.wrong()
