"""Packets a second of sources with a cached verdict, if the kernel caches a thousand of them, or half a million.

Each size has a gateway of its own, and all run side by side. The real agent makes the ruleset. nft adds the
elements, all from one allowed prefix. The agent ends before the race, but ruleset and elements stay.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from datetime import date
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import uuid4

from bench import lanes
from bench.figures import Curve, Figure
from bench.lanes import SEGMENT, Lane, ratio
from kernel.conftest import ALLOWED
from portward.lab import namespaces
from portward.lab.agent import Agent
from portward.model import Attachment, Subscription

SIZES = {"1k": 1_000, "10k": 10_000, "65k": 65_536, "500k": 500_000}
_PREFIX = ip_network("10.128.0.0/9")
_BATCH = 20_000


def measure(folder: Path, rounds: int = 200) -> list[Figure | Curve]:
    """`cached_…_vs_1k`: the rate if all of this many cached sources send in turn, and a curve of it."""
    with ExitStack() as stack:
        standing = {}
        for name, size in SIZES.items():
            standing[name] = stack.enter_context(Lane())
            _fill(standing[name], folder / name, size)
        packets = {
            name: lanes.frames(folder / f"{name}.frames", _sources(size), 25) for name, size in SIZES.items()
        }
        rates = lanes.race(folder, standing, packets, rounds=rounds)
    points = [(float(size), statistics.median(rates[name]) / 1000) for name, size in SIZES.items()]
    return [
        *(ratio(f"cached_{name}_vs_1k", rates, name, "1k") for name in list(SIZES)[1:]),
        Curve(
            "cached-rate", "A cached allow, all sources in turn", "cached sources",
            "1,000 packets/s of a core", {"forwarded": points},
        ),
    ]  # fmt: skip


def _sources(count: int) -> list[bytes]:
    first = int(_PREFIX.network_address)
    return [(first + number).to_bytes(4, "big") for number in range(count)]


def _fill(lane: Lane, folder: Path, count: int) -> None:
    folder.mkdir()
    id_ = uuid4()
    agent = Agent(
        lane, folder, segments=[SEGMENT], verdicts={"sources": 1_000_000, "allow_seconds": 3600},
        ruleset={"owned": "never"},
    )  # fmt: skip
    agent.apply(
        Subscription(id=id_, offer=ALLOWED, created=date(2022, 6, 30)),
        Attachment(segment=SEGMENT, address=_PREFIX, subscription=id_),
    )
    agent.start()
    agent.stop()
    every = _sources(count)
    for start in range(0, count, _BATCH):
        elements = ", ".join(f"{SEGMENT} . {ip_address(one)}" for one in every[start : start + _BATCH])
        namespaces.load(lane.gateway, f"add element inet portward allow4 {{ {elements} }}")
