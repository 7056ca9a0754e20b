"""The job that keeps a custodian beside a table with an owner."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from portward.daemon import custodian_watch
from portward.daemon.core import Core
from portward.daemon.steps import Step, StepRunner
from portward.dataplane.tableowner import CustodianError, Ownership


class Owner:
    """A `TableOwner` whose custodian ends when the test closes the writing end of a pipe."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.has_custodian, self.has_ended = True, False
        # How often the job has asked for the descriptor, which is once for each round.
        self.rounds = 0

    @property
    def descriptor(self) -> int | None:
        """Readable at the custodian's end."""
        self.rounds += 1
        return self.reading if self.has_custodian else None

    def end(self) -> None:
        """The custodian ends."""
        self.has_ended = True
        os.close(self.writing)


class Gateway:
    """A core with such an owner. `error`: what the next attempts to start a custodian raise."""

    def __init__(self) -> None:
        self.table_owner, self.owned = Owner(), True
        self.kept = 0
        # Whether a custodian that has ended is still taken for one.
        self.stays = False
        self.error: Exception | None = None

    @property
    def ownership(self) -> Ownership:
        """Whether the loaded table has an owner."""
        return Ownership(self.owned, 7, "")

    def keep_table(self) -> None:
        """See `Core.keep_table`."""
        self.kept += 1
        owner = self.table_owner
        if owner.has_ended and not self.stays:
            owner.has_custodian = owner.has_ended = False
        if self.error is not None:
            raise self.error
        owner.has_custodian = self.owned


def watched(gateway: Gateway, until: Callable[[], object], interval_s: float = 60.0) -> StepRunner:
    """Runs the job until something holds."""
    steps = StepRunner()

    async def kernel(work: Callable[[], Any]) -> Any:
        return work()

    async def run() -> None:
        job = asyncio.ensure_future(custodian_watch.watch(cast("Core", gateway), kernel, steps))
        try:
            async with asyncio.timeout(60):
                while not until():
                    await asyncio.sleep(0.005)  # pause: of a poll
        finally:
            job.cancel()
        await asyncio.wait({job})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custodian_watch, "_INTERVAL_S", interval_s)
        asyncio.run(run())
    return steps


def test_a_custodian_that_ends_is_replaced_at_once() -> None:
    gateway = Gateway()
    gateway.table_owner.end()
    watched(gateway, lambda: gateway.kept)
    assert gateway.table_owner.has_custodian


@pytest.mark.parametrize("owned", [True, False], ids=["the table has an owner now", "it has none any more"])
def test_after_a_reload_there_is_a_custodian_or_none(owned: bool) -> None:
    gateway = Gateway()
    gateway.owned, gateway.table_owner.has_custodian = owned, not owned
    watched(gateway, lambda: gateway.kept, 0.01)
    assert gateway.table_owner.has_custodian is owned


def test_as_long_as_all_is_well_the_kernel_thread_sleeps() -> None:
    gateway = Gateway()
    watched(gateway, lambda: gateway.table_owner.rounds > 5, 0.01)
    assert gateway.kept == 0


def test_a_custodian_that_cannot_be_started_is_tried_again_with_pauses() -> None:
    gateway = Gateway()
    gateway.error = CustodianError("no process")
    gateway.table_owner.end()
    began = time.monotonic()
    steps = watched(gateway, lambda: time.monotonic() > began + 0.5, 0.01)  # of the second until it is tried again
    assert (gateway.kept, steps.failures[Step.CUSTODIAN]) == (1, 1)


def test_while_it_waits_to_be_tried_again_a_custodian_that_ended_does_not_wake_the_job_without_end() -> None:
    """It would take a whole core."""
    gateway = Gateway()
    gateway.error = CustodianError("it does not end")
    gateway.stays = True
    gateway.table_owner.end()
    began = time.monotonic()
    watched(gateway, lambda: time.monotonic() > began + 0.5)  # of the second until it is tried again
    assert gateway.kept == 1
    assert gateway.table_owner.rounds <= 2
