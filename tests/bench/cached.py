"""Many cached sources: the duration of a scrape, and the agent's processor time to read their counters.

nft adds the elements beside the agent, with counts that agree with the policy. Each subscription has eight
sources. Allowed sources are in one segment and denied ones in the other, half of them IPv4 and half IPv6.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
import urllib.request
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from bench import idle
from bench.apply import apply_file
from bench.figures import Curve, Figure
from kernel.conftest import ALLOWED, DENIED, lab_name
from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.topology import CONTOSO, FABRIKAM, Lab, Tenant

SIZES = {"1k": 1_000, "10k": 10_000, "65k": 65_536, "500k": 500_000}
_CACHED = "portward_remembered_sources"
_EACH = 8  # sources of a subscription
_BATCH = 10_000
_SCRAPES = 5
_WATCHED = 12.0  # seconds: two readings or more
_FIRST4, _FIRST6 = int(IPv4Address("10.128.0.0")), int(IPv6Address("2001:db8:ffff::"))


class Part(NamedTuple):
    """A set, and the segment, offer and id prefix of its sources' subscriptions."""

    name: str
    tenant: Tenant
    offer: str
    mark: int  # the beginning of the subscriptions' ids


PARTS = (
    Part("allow4", CONTOSO, ALLOWED, 1),
    Part("deny4", FABRIKAM, DENIED, 2),
    Part("allow6", CONTOSO, ALLOWED, 3),
    Part("deny6", FABRIKAM, DENIED, 4),
)


def settings(**verdicts: int) -> dict[str, object]:
    """Settings of an agent whose sets hold as many sources as are needed here, for long enough."""
    return {
        "max_flip_share": 1.0,
        "verdicts": {"sources": 1_000_000, "allow_seconds": 7_200, "deny_seconds": 7_200, **verdicts},
    }


def inventory(path: Path, sources: int) -> None:
    """Writes an inventory that covers the first `sources` sources that `fill` adds."""
    subscriptions, attachments = [], []
    for part in PARTS:
        for number in range(-(-sources // len(PARTS) // _EACH)):
            id_ = str(UUID(int=part.mark << 120 | 0x4000_8000 << 48 | number))
            subscriptions.append({"id": id_, "offer": part.offer, "created": "2022-06-30"})
            first = _address(part, number * _EACH)
            prefix = IPv4Network((first, 29)) if part.name[-1] == "4" else IPv6Network((first, 125))
            attachments.append({"segment": part.tenant.segment, "address": str(prefix), "subscription": id_})
    path.write_text(json.dumps({"subscriptions": subscriptions, "attachments": attachments}))


def fill(lab: Lab, first: int, last: int, *, packets: int = 3) -> None:
    """Adds the sources from number `first` up to `last` (without it) to the kernel's sets on the gateway, each as
    if it had sent this many `packets`. The agent's table must hold the policy of `inventory`."""
    with namespaces.inside(lab.gateway):
        indexes = {part.name: socket.if_nametoindex(part.tenant.segment) for part in PARTS}
    for part in PARTS:
        numbers = range(first // len(PARTS), last // len(PARTS))
        for start in range(0, len(numbers), _BATCH):
            elements = ", ".join(
                f"{indexes[part.name]} . {_address(part, number)} counter packets {packets} bytes {packets * 40}"
                for number in numbers[start : start + _BATCH]
            )
            namespaces.load(lab.gateway, f"add element inet portward {part.name} {{ {elements} }}")


def _address(part: Part, number: int) -> IPv4Address | IPv6Address:
    return IPv4Address(_FIRST4 + number) if part.name[-1] == "4" else IPv6Address(_FIRST6 + number)


def measure(folder: Path, sizes: dict[str, int] = SIZES) -> list[Figure | Curve]:
    """`scrape_ms_at_…` and `counting_cpu_percent_at_…` for each size, and a curve of each."""
    figures: list[Figure | Curve] = []
    scraped, counted = [], []
    with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
        agent = Agent(lab, folder, **settings(), ruleset={"owned": "never"})
        inventory(folder / "inventory.json", max(sizes.values()))
        apply_file(agent, folder / "inventory.json")
        agent.start(seconds=60)
        before = 0
        for name, size in sizes.items():
            fill(lab, before, size)
            before = size
            until(lambda size=size: _cached(agent) >= size, f"{size} are counted", seconds=120)  # type: ignore[misc]
            cpu = idle.cpu_percent(agent, _WATCHED)
            scrapes = list(_scrapes(lab))
            milliseconds = statistics.median(scrapes)
            scraped.append((float(size), milliseconds))
            counted.append((float(size), cpu))
            unit = f"ms, {size // _EACH} subscriptions"
            goal = "<= 100" if name == "1k" else ""
            figures.append(Figure(f"scrape_ms_at_{name}", milliseconds, min(scrapes), max(scrapes), unit, goal))
            figures.append(Figure(f"counting_cpu_percent_at_{name}", cpu, cpu, cpu, "% of a core"))
        agent.stop()
    x = "cached sources"
    return [
        *figures,
        Curve("cached-scrape", "A scrape, with metrics by subscription", x, "ms", {"scrape": scraped}),
        Curve("cached-counting", "The agent at rest, reading all counters", x, "% of a core", {"agent": counted}),
    ]


def _cached(agent: Agent) -> float:
    time.sleep(0.2)  # pause: the pace of the scrapes
    found = agent.metrics()
    return sum(found.get(f'{_CACHED}{{verdict="{word}"}}', 0) for word in ("allow", "deny"))


def _scrapes(lab: Lab) -> Iterator[float]:
    """How long scrapes take, in ms, one after the other."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with namespaces.inside(lab.gateway):
        for _ in range(_SCRAPES):
            began = time.monotonic()
            with opener.open("http://127.0.0.1:9125/metrics", timeout=60) as reply:
                reply.read()
            yield (time.monotonic() - began) * 1000
            time.sleep(0.2)  # pause: the pace of the scrapes
