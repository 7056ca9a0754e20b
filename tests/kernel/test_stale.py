"""No verdict that was found under an older policy is cached, however slow the worker is, and no verdict that was
found under a newer one is lost."""

from __future__ import annotations

import re
import signal
import struct
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from kernel.churn import Churn, churned
from kernel.conftest import ALLOWED, DENIED, Gateway, lab_name, lab_of, source_records
from portward.base.clock import utc_now
from portward.config.keys import QueueReader
from portward.dataplane.elements import Add
from portward.dataplane.reach import reach
from portward.lab import namespaces
from portward.lab.topology import CONTOSO, FABRIKAM, Lab
from portward.policy import presets
from portward.table.commits import Answers, Committed
from portward.table.writer import Writer


# The kind of the lab, and the reader. NetfilterQueue does not read frames of a bridge.
@pytest.mark.parametrize(
    ("kind", "reader"), [*(("routed", reader) for reader in QueueReader), ("bridged", QueueReader.BATCH)]
)
@pytest.mark.parametrize("address", ["10.0.0.4", "2001:db8:1001::4"])
def test_no_stale_verdict_is_cached(tmp_path: Path, address: str, kind: str, reader: QueueReader) -> None:
    with lab_of(kind) as lab:
        stale, cached = churned(
            lab, tmp_path, address, 400, lambda churn, committed: churn.carry_out(committed), reader
        )
    assert cached > 40, "the source hardly got a verdict: nothing was tried"
    assert stale == 0


@pytest.mark.parametrize("reader", QueueReader)
def test_without_the_step_of_the_epoch_stale_verdicts_are_seen(tmp_path: Path, reader: QueueReader) -> None:
    """Shows that the test above can fail: without the step of the epoch, stale verdicts are cached."""

    def left_out(generation: int, links: Iterable[int] = ()) -> None:
        """Stands for the step, and does nothing."""

    def forget_only(churn: Churn, committed: Committed) -> None:
        churn.cache.move_epoch = left_out  # type: ignore[method-assign]
        churn.cache.forget(reach(churn.links, committed).single, committed.generation)

    def both_epochs(churn: Churn, committed: Committed) -> None:
        # Make the last three epochs current, as if verdicts carried none. Use netlink, because nft takes some
        # milliseconds, and by then the verdicts in flight would have arrived.
        epochs = [(committed.generation - back) % 8191 << 3 for back in range(3)]
        churn.elements.commit([Add("epoch", [struct.pack("=I", epoch) for epoch in epochs])])
        forget_only(churn, committed)

    # Whether a change meets a verdict in flight depends on the machine, so try until one does.
    for number in range(10):
        with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
            stale, _ = churned(lab, tmp_path / str(number), "10.0.0.4", 400, both_epochs, reader)
        if stale:
            return
    pytest.fail("no stale verdict was seen in 4,000 changes without an epoch: the test above shows nothing")


def test_a_verdict_from_a_table_that_is_ahead_of_the_kernel_acts(make_gateway: Callable[..., Gateway]) -> None:
    """The table is committed some milliseconds before the kernel's epoch moves. A worker's verdict in between must
    take effect: if the packet were dropped, an allowed sender would wait a second until it repeats its SYN."""
    gateway = make_gateway()
    gateway.source(CONTOSO, "10.66.0.0/16", ALLOWED)
    gateway.source(CONTOSO, "10.67.0.0/16", DENIED)
    assert gateway.agent.process is not None
    gateway.agent.process.send_signal(signal.SIGSTOP)  # otherwise the kernel's epoch would follow at once
    try:
        for number in range(3):
            ahead(gateway, number)
            assert gateway.passes(CONTOSO, f"10.66.0.{number + 1}")
            assert not gateway.passes(CONTOSO, f"10.67.0.{number + 1}")
        assert "10.66.0" not in gateway.listing("allow4"), "not cached: the epoch is not the kernel's"
        assert (counter(gateway, "stale"), counter(gateway, "unmarked")) == (6, 0)
    finally:
        gateway.agent.process.send_signal(signal.SIGCONT)


def counter(gateway: Gateway, name: str) -> int:
    """The packets of a named counter of the ruleset."""
    listing = namespaces.run(gateway.lab.gateway, ["nft", "list", "counter", "inet", "portward", name]).stdout
    found = re.search(r"packets (\d+)", listing)
    assert found is not None
    return int(found[1])


def ahead(gateway: Gateway, number: int) -> None:
    """Commits a change to the agent's policy table, but not to the kernel."""
    table, preset = gateway.agent.folder / "table", presets.load("azure-2020")
    with closing(Writer(table, preset, Answers(observe=False, reject=False))) as writer:
        head = writer.head()
        assert head is not None
        records = source_records(FABRIKAM, f"10.68.0.{number}", ALLOWED, uuid4())
        done = writer.apply(records, [], revision=head.revision, now=utc_now(), hash_=head.hash)
        assert done.generation == head.generation + 1
