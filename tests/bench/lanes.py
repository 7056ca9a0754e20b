"""Gateways side by side, each with a ruleset of its own, and how fast the same packets go through each.

A lane is a tenant's machine, a gateway and the Internet's side, joined by two veth pairs. This is the shortest way
that a forwarded packet can take, without tunnels, connection tracking and address translation, so the cost of a
ruleset shows most. `lanes.c` sends through all of them in turns. A rate is packets per second of processor time of
the one core that sends and forwards.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import flood
from bench.figures import Figure
from bench.standing import Standing
from portward.lab import namespaces

SEGMENT = "vni1001"
CPU = 0
# These are the same in all lanes, so that one file of frames serves them all.
_TENANT, _GATEWAY, _INTERNET = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"
_DROP = "table netdev bench { chain end { type filter hook ingress device eth0 priority 0; policy drop; }; }"

Rates = dict[str, list[float]]


class Lane(Standing):
    """The three namespaces. Tenants' addresses are in 10.0.0.0/8 and 2001:db8:1001::/48; all else goes to the
    Internet's side, which takes no packet further than its link."""

    def __init__(self, ruleset: str = "") -> None:
        """`ruleset` is a text for `nft -f`, which is loaded on the gateway."""
        super().__init__("t", "g", "i")
        self.tenant, self.gateway, self.internet = self.names
        self._ruleset = ruleset

    def run(self, namespace: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """See `namespaces.run`."""
        return namespaces.run(namespace, argv)

    def _up(self) -> None:
        for device, mac, peer, peer_mac in (
            (SEGMENT, _GATEWAY, self.tenant, _TENANT),
            ("up0", _GATEWAY, self.internet, _INTERNET),
        ):
            namespaces.ip("-n", self.gateway, "link", "add", device, "address", mac, "type", "veth",
                          "peer", "name", "eth0", "address", peer_mac, "netns", peer)  # fmt: skip
            namespaces.batch(self.gateway, [f"link set {device} up"])
            namespaces.batch(peer, ["link set eth0 up"])
        namespaces.sysctl(
            self.gateway, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1",
            "net.ipv4.conf.all.rp_filter=0", f"net.ipv4.conf.{SEGMENT}.rp_filter=0",
        )  # fmt: skip
        namespaces.batch(
            self.gateway,
            [
                f"addr add 10.0.0.1/8 dev {SEGMENT}",
                f"addr add 2001:db8:1001::1/48 dev {SEGMENT} nodad",
                "addr add 198.51.100.1/24 dev up0",
                "addr add 2001:db8:ffff::1/64 dev up0 nodad",
                f"neigh add 198.51.100.2 lladdr {_INTERNET} dev up0 nud permanent",
                f"neigh add 2001:db8:ffff::2 lladdr {_INTERNET} dev up0 nud permanent",
                "route add default via 198.51.100.2",
                "route add ::/0 via 2001:db8:ffff::2",
            ],
        )
        namespaces.load(self.internet, _DROP)
        if self._ruleset:
            namespaces.load(self.gateway, self._ruleset)


def frame(source: str, port: int) -> bytes:
    """A SYN from an address of a tenant to a port of the Internet's side, as it is on the tenant's link."""
    from scapy.layers.l2 import Ether

    from kernel.wire import segment

    return bytes(Ether(src=_TENANT, dst=_GATEWAY) / segment(source, port=port))


def frames(path: Path, sources: Iterable[bytes], port: int, *, family: int = 4) -> Path:
    """Writes the same SYN from each of these sources (4 or 16 bytes) to a file, and gives its path."""
    first = frame("10.0.0.4" if family == 4 else "2001:db8:1001::4", port)
    return flood.write(path, flood.from_sources(first, sources))


def race(
    folder: Path, lanes: dict[str, Lane], packets: Path | dict[str, Path], *, rounds: int, slice_s: float = 0.01
) -> Rates:
    """The rate of each lane in each round, in packets a second. All lanes get the same frames, or each its own."""
    files = packets if isinstance(packets, dict) else dict.fromkeys(lanes, packets)
    program = flood.build(folder, "lanes.c")
    with _busy_elsewhere() as elsewhere:
        out = subprocess.run(
            [os.fspath(program), "--cpu", str(CPU), "--rounds", str(rounds),
             "--slice", str(slice_s), *(f"{lane.tenant}:eth0:{files[name]}" for name, lane in lanes.items())],
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
    if elsewhere[0] > rounds * len(lanes) * slice_s / 50:
        raise RuntimeError(f"ksoftirqd did {elsewhere[0]:.2f} s of the work, which no rate here counts")
    names = list(lanes)
    rates: Rates = {name: [] for name in names}
    for line in out.splitlines():
        printed = json.loads(line)
        rates[names[printed["lane"]]].append(printed["packets"] / printed["seconds"])
    return rates


def ratio(name: str, rates: Rates, lane: str, to: str, goal: str = "") -> Figure:
    """A lane's rate as a share of another's: the median over the rounds, and the quartiles."""
    shares = [one / other for one, other in zip(rates[lane], rates[to], strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return Figure(name, middle, low, high, f"of {statistics.median(rates[to]) / 1000:.0f} k/s", goal)


@contextmanager
def _busy_elsewhere() -> Iterator[list[float]]:
    """Yields a list, to which it adds at the end how long ksoftirqd of the lanes' core was busy, in seconds."""
    pid = subprocess.run(["pgrep", "-x", f"ksoftirqd/{CPU}"], capture_output=True, text=True, check=True).stdout
    found: list[float] = []
    before = _busy(int(pid))
    yield found
    found.append(_busy(int(pid)) - before)


def _busy(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
