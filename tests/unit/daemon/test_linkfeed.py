"""Interfaces that change while the policy table is busy, and while it is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from portward.config.keys import Config
from portward.daemon.core import Core
from portward.daemon.linkfeed import LinkFeed, in_doubt
from portward.daemon.steps import StepRunner
from portward.daemon.threads import Threads
from portward.dataplane.links import Device, Links
from portward.dataplane.pending import Work

FIRST = Links({1: "lo", 7: "vni7001", 8: "vni7002"}, frozenset())


class Gateway:
    """A policy table that accepts changes when it is free, and a kernel thread. Both record their calls."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.written: list[tuple[Links, int]] = []
        self.dropped: list[tuple[frozenset[int], int]] = []
        self.events: asyncio.Queue[Links] = asyncio.Queue()
        self.work: Work | None = None
        self.fails = 0
        config = Config(segments=("vni*",), uplinks=("up0",), store="sqlite:/x", table=cast("Any", None))
        self.seen: list[Links] = []
        core = SimpleNamespace(
            intake=SimpleNamespace(links_changed=self._write),
            dataplane=SimpleNamespace(config=config, unsettle=self._drop, links_seen=self.seen.append),
            work=None,
        )
        self._core = core
        threads = SimpleNamespace(policy=self._policy, kernel=self._kernel)
        self.steps = StepRunner()
        self.feed = LinkFeed(cast("Core", core), cast("Threads", threads), self.steps, FIRST)

    def _write(self, links: Links, number: int) -> bool:
        self.written.append((links, number))
        self.fails -= 1
        return self.fails < 0

    def _drop(self, indexes: frozenset[int], number: int) -> None:
        self.dropped.append((indexes, number))

    async def _policy(self, work: Callable[[], bool | None]) -> bool | None:
        await self.free.wait()
        return work()

    async def _kernel(self, work: Callable[[], bool | None]) -> bool | None:
        return work()

    async def _links(self) -> AsyncIterator[Links]:
        while True:
            yield await self.events.get()

    def busy(self) -> None:
        """The table is busy with a long change."""
        self._core.work = Work("a bulk change", time.monotonic() - 10)

    async def run(self, script: Callable[[], Any]) -> None:
        """Runs the jobs until the script has come to its end."""
        jobs = [
            asyncio.create_task(job)
            for job in (
                self.feed.follow(self._links()),
                self.feed.see(),
                self.feed.write(),
                self.feed.close_uncertain(),
            )
        ]
        await script()
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


async def until(true: Callable[[], bool]) -> None:
    """Waits until `true()` is true, within the time limit of the test."""
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.001)  # pause: of a poll


def test_a_table_that_is_busy_takes_all_changes_at_once_and_the_kernel_drops_until_then() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        gateway.busy()

        async def script() -> None:
            gateway.events.put_nowait(Links({1: "lo", 8: "vni7002"}, frozenset({7})))
            await until(lambda: gateway.dropped == [(frozenset({7}), 1)])
            gateway.events.put_nowait(Links({1: "lo", 7: "vni7003", 8: "vni7002"}, frozenset()))
            gateway.events.put_nowait(Links({1: "lo", 7: "vni7003"}, frozenset({8})))
            await until(lambda: gateway.dropped[1:] == [(frozenset({8}), 3)])
            assert gateway.written == []
            gateway.free.set()
            await until(lambda: bool(gateway.written) and gateway.written[-1][1] == 3)

        await gateway.run(script)
        touched = frozenset[int]().union(*(links.touched for links, _ in gateway.written))
        assert touched == {7, 8}
        assert gateway.written[-1][0].names == {1: "lo", 7: "vni7003"}
        assert gateway.written[-1][1] == 3

    asyncio.run(scenario())


def test_a_table_that_is_free_takes_a_change_in_and_the_kernel_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("portward.daemon.linkfeed._PATIENCE_S", 60.0)

    async def scenario() -> None:
        gateway = Gateway()
        gateway.free.set()

        async def script() -> None:
            gateway.events.put_nowait(Links({1: "lo", 8: "vni7002"}, frozenset({7})))
            await until(lambda: len(gateway.written) == 1)
            gateway.events.put_nowait(Links({1: "lo"}, frozenset({8})))
            await until(lambda: len(gateway.written) == 2)

        await gateway.run(script)
        assert gateway.dropped == []

    asyncio.run(scenario())


def test_interfaces_that_are_no_segments_are_never_dropped() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        gateway.busy()

        async def script() -> None:
            gateway.events.put_nowait(Links({7: "vni7001", 8: "vni7002"}, frozenset({1})))
            gateway.events.put_nowait(Links({7: "vni7001"}, frozenset({8})))
            await until(lambda: bool(gateway.dropped))

        await gateway.run(script)
        assert gateway.dropped == [(frozenset({8}), 2)]

    asyncio.run(scenario())


def test_a_table_that_refuses_a_change_has_the_kernel_drop() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        gateway.free.set()
        gateway.fails = 1

        async def script() -> None:
            gateway.events.put_nowait(Links({1: "lo", 8: "vni7002"}, frozenset({7})))
            await until(lambda: gateway.dropped == [(frozenset({7}), 1)])

        await gateway.run(script)

    asyncio.run(scenario())


def test_what_stands_on_a_segment_gets_to_the_kernel_while_the_table_is_busy() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        gateway.busy()
        bridged = FIRST._replace(devices=(Device(7, "vni7001", master=9), Device(9, "br0", "bridge")))

        async def script() -> None:
            gateway.events.put_nowait(bridged)
            await until(lambda: gateway.seen == [bridged])
            assert gateway.written == []
            gateway.free.set()
            await until(lambda: bool(gateway.written))
            assert gateway.written == [(bridged, 1)], "and to the table, with the devices"

        await gateway.run(script)

    asyncio.run(scenario())


def in_vrf(*ports: int, touched: frozenset[int] = frozenset()) -> Links:
    """Segments 7 and 8, of which some are ports of the VRF 20."""
    devices = (Device(20, "blue", "vrf"), *(Device(n, f"vni700{n}", master=20 * (n in ports)) for n in (7, 8)))
    return Links({device.ifindex: device.name for device in devices}, touched, devices)


@pytest.mark.parametrize(
    ("before", "after", "doubt"),
    [
        (in_vrf(), in_vrf(7), set()),
        (in_vrf(7), in_vrf(7), set()),
        (in_vrf(7), in_vrf(8), {20}),
        (in_vrf(7), in_vrf(7, 8), {20}),
        (in_vrf(7), in_vrf(), {20}),
        (in_vrf(7), in_vrf(7, touched=frozenset({7})), {7, 20}),
        (in_vrf(7, 8), in_vrf(8), set()),
        (in_vrf(7), in_vrf(7, touched=frozenset({99})), set()),
    ],
    ids=["first", "same", "other", "second", "left", "reused", "one-left", "no-segment"],
)
def test_a_vrf_whose_one_port_is_another_one_is_in_doubt(before: Links, after: Links, doubt: set[int]) -> None:
    """The table has the port's entries for the VRF, too, because packets from the forward guard name the VRF."""
    assert in_doubt(before, after, lambda name: name.startswith("vni")) == doubt
