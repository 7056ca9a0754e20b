"""A segment becomes a port of a bridge that has another port: how long its packets pass without a verdict.
Packets from a bridge without a port are dropped (set `known_interfaces`).

The time runs from the return of `ip link set SEGMENT master BRIDGE`, when packets can come out of the bridge, to
the moment when the kernel has the chain that drops them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from bench.figures import Figure, percentile
from kernel.conftest import running_gateway
from portward.dataplane.names import TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.lab import namespaces
from portward.lab.agent import until

_PATIENCE: Final = 10.0


def measure(folder: Path, rounds: int = 100) -> list[Figure]:
    """`stacked_closed_ms`."""
    with running_gateway(folder) as gateway:
        home = gateway.lab.gateway
        with namespaces.inside(home):
            kernel = NfNetlink()
        namespaces.batch(
            home,
            [
                "link add vni7001 type veth peer name far7001",
                "link add top type bridge",
                "link add other type ifb",
                "link set other master top",
                "link set vni7001 up",
                "link set top up",
            ],
        )
        until(lambda: "vni7001:" in gateway.agent.portward("status").stdout, "the segment is followed")
        took = [_once(home, kernel) for _ in range(rounds)]
    return [
        Figure(
            "stacked_closed_ms", percentile(took, 0.99), percentile(took, 0.5), max(took),
            "ms, p99 (from: median, to: largest)",
        )
    ]  # fmt: skip


def _once(home: str, kernel: NfNetlink) -> float:
    """Milliseconds of one round."""
    namespaces.batch(home, ["link set vni7001 master top"])
    began = time.monotonic()
    _wait(kernel, there=True)
    took = time.monotonic() - began
    namespaces.batch(home, ["link set vni7001 nomaster"])
    _wait(kernel, there=False)
    return took * 1000


def _wait(kernel: NfNetlink, *, there: bool) -> None:
    deadline = time.monotonic() + _PATIENCE
    while ("stacked" in kernel.hooks(TABLE)) is not there:
        if time.monotonic() > deadline:
            raise TimeoutError("the agent does not follow")
        time.sleep(0.0002)  # pause: of a poll
