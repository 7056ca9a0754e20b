"""No verdict that was found under an older policy is remembered, however slow the worker is."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import pytest

from kernel.churn import Churn, churned
from kernel.conftest import lab_name
from portward.config import QueueReader
from portward.gateway.elements import Add
from portward.lab.topology import CONTOSO, FABRIKAM, Lab
from portward.table.writer import Committed


@pytest.mark.parametrize("reader", QueueReader)
@pytest.mark.parametrize("address", ["10.0.0.4", "2001:db8:1001::4"])
def test_no_stale_verdict_is_remembered(tmp_path: Path, address: str, reader: QueueReader) -> None:
    with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
        stale, remembered = churned(
            lab, tmp_path, address, 400, lambda churn, committed: churn.enforcement.enforce(committed), reader
        )
    assert remembered > 40, "the source hardly got a verdict: nothing was tried"
    assert stale == 0


@pytest.mark.parametrize("reader", QueueReader)
def test_without_the_step_of_the_epoch_stale_verdicts_are_seen(tmp_path: Path, reader: QueueReader) -> None:
    """That the test above can fail: the same without step one of a change."""

    def left_out(generation: int, links: Iterable[int] = ()) -> None:
        """The step."""

    def forget_only(churn: Churn, committed: Committed) -> None:
        churn.learned.move_epoch = left_out  # type: ignore[method-assign]
        churn.learned.forget(churn.enforcement._sources(committed), committed.generation)

    def both_epochs(churn: Churn, committed: Committed) -> None:
        # Every epoch is current: as if verdicts carried none.
        # By netlink: while nft works for some milliseconds, the verdicts in flight would arrive.
        epochs = [(committed.generation - back) % 8191 << 3 for back in range(3)]
        churn.elements.commit([Add("epoch", [struct.pack("=I", epoch) for epoch in epochs])])
        forget_only(churn, committed)

    # How often a change meets a verdict in flight depends on the machine: some rounds, until one does.
    for number in range(10):
        with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
            stale, _ = churned(lab, tmp_path / str(number), "10.0.0.4", 400, both_epochs, reader)
        if stale:
            return
    pytest.fail("no stale verdict was seen in 4,000 changes without an epoch: the test above shows nothing")
