"""The cost of other programs that change their own nftables 200 times a second, as kube-proxy and CrowdSec do.

Measured are start, repair, the first verdict of a new source, and the agent's processor time, with these changes
and without them, in turns.

`start`: from the start of the program to the first packet that only a worker can let pass. `repair`: from the
deletion of portward's table to the moment when the ruleset is back. `first verdict`: from the first packet of a
source without a cached verdict to its arrival; a packet is sent each 2 ms."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from bench.figures import Figure
from bench.idle import cpu_percent
from bench.start import first_verdict
from kernel.conftest import ALLOWED, lab_name, source_records
from kernel.foreign import traffic
from kernel.wire import Sender, same, seen, segment
from portward.dataplane.names import FIXED_SETS, TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.topology import CONTOSO, FABRIKAM, Lab

_ROUNDS = 5
_EACH = 4
_SECONDS = 20.0


def measure(folder: Path) -> list[Figure]:
    """The figures `foreign_…`, each also as `…_alone` without the other programs."""
    found: dict[str, list[float]] = {}
    with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
        agent = Agent(lab, folder, segments=["vni1001", "vni1002"], ruleset={"owned": "never"})
        agent.apply(*source_records(CONTOSO, "10.64.0.0/10", ALLOWED, uuid4()))
        agent.start()
        agent.stop()
        for number in range(_ROUNDS):
            for busy in (True, False):
                with traffic(lab.gateway) if busy else contextlib.nullcontext():
                    for name, values in _round(lab, agent, 2 * number + busy):
                        found.setdefault(f"foreign_{name}{'' if busy else '_alone'}", []).extend(values)
    return [_figure(name, values) for name, values in found.items()]


def _round(lab: Lab, agent: Agent, number: int) -> Iterator[tuple[str, list[float]]]:
    source = iter(f"10.{64 + number}.0.{host}" for host in range(1, 250))
    yield "start_s", [first_verdict(lab, agent, next(source))]
    until(lambda: _is_up(agent), "it answers")
    yield "first_verdict_ms", [_verdict_ms(lab, next(source)) for _ in range(_EACH)]
    yield "repair_ms", [_repair_ms(lab) for _ in range(_EACH)]
    time.sleep(1)  # pause: the work of the repairs is over
    yield "cpu_percent", [cpu_percent(agent, _SECONDS / _EACH) for _ in range(_EACH)]
    agent.stop()


def _is_up(agent: Agent) -> bool:
    with contextlib.suppress(OSError):
        return agent.metrics()["portward_ruleset_broken"] == 0
    return False


def _verdict_ms(lab: Lab, address: str) -> float:
    packet, sender, going = segment(address), Sender(lab, CONTOSO), threading.Event()

    def send() -> None:
        while not going.wait(0.002):
            sender.send(packet)

    with seen(lab.internet) as view:
        thread = threading.Thread(target=send)
        began = time.monotonic()
        thread.start()
        try:
            if view.first(same(packet), seconds=20) is None:
                raise TimeoutError("no verdict within 20 s")
            return 1000 * (time.monotonic() - began)
        finally:
            going.set()
            thread.join()
            sender.close()


def _repair_ms(lab: Lab) -> float:
    with namespaces.inside(lab.gateway):
        netlink = NfNetlink()
    try:
        before = _known(lambda: netlink.fingerprint(TABLE, FIXED_SETS))
        namespaces.load(lab.gateway, f"delete table inet {TABLE}")
        began = time.monotonic()
        until(lambda: _known(lambda: netlink.fingerprint(TABLE, FIXED_SETS)) == before, "the ruleset is back")
        return 1000 * (time.monotonic() - began)
    finally:
        netlink.close()
        time.sleep(0.2)  # pause: the pace of the repairs


def _known(read: Callable[[], bytes | None]) -> bytes | None:
    while True:
        with contextlib.suppress(InterruptedError):
            return read()


def _figure(name: str, values: list[float]) -> Figure:
    goal = "<= 2" if name == "foreign_cpu_percent" else ""
    unit = {"s": "s", "ms": "ms", "percent": "% of a core, daemon and worker"}[
        name.removesuffix("_alone").split("_")[-1]
    ]
    return Figure(
        name, statistics.median(values), min(values), max(values), f"{unit}, median of {len(values)}", goal
    )
