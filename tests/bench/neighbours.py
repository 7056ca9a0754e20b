"""Connections of one tenant while two others flood the gateway with sources, at the highest rate that trafgen
makes.

The first floods with spoofed IPv4 sources that no attachment covers, the second with all the addresses of its own
allowed /64. The third opens real connections, each from a source that the gateway has not seen before. Both
generators, and the kernel's work for their packets, are pinned to the first core; then to all cores, which leaves
none to the gateway alone. All other processes run on any core.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from bench.figures import Figure, percentile
from kernel.conftest import ALLOWED, Gateway, running_gateway, source_records
from kernel.wire import link_address, listening, segment
from portward.lab import namespaces
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Lab, Tenant

LITWARE = Tenant("litware", 1003)
_PREFIX = "2001:db8:1003:5::"
_OWN = "2001:db8:1002:7::"
# A SYN is retransmitted after one second, so a connection that takes nearly that long has lost a packet.
_LOST = 0.9
_IPV6_FREEBIND = 78  # linux/in6.h; needed because a route gives us the prefix, and no link has an address of it


def measure(folder: Path, seconds: float = 20.0) -> list[Figure]:
    """Under the floods: the time to connect from a new source, the share of connections made, and the share of
    cached verdicts that survive."""
    with running_gateway(folder, (CONTOSO, FABRIKAM, LITWARE), verdicts={"allow_seconds": 600}) as gateway:
        gateway.agent.apply(
            *source_records(FABRIKAM, f"{_OWN}/64", ALLOWED, uuid4()),
            *source_records(LITWARE, f"{_PREFIX}/64", ALLOWED, uuid4()),
        )
        _route(gateway.lab)
        with listening(gateway.lab):
            quiet, _ = _connect(gateway.lab, 3.0, first=1)
            print(f"quiet: median {percentile(quiet, 0.5):.2f} ms, p99 {percentile(quiet, 0.99):.2f} ms")
            cached = _cached(gateway)
            figures = _flooded(gateway, folder, seconds, cores=1, name="from_one_core")
            figures += _flooded(gateway, folder, seconds, cores=os.cpu_count() or 1, name="from_all_cores")
            survived = len(cached & _cached(gateway))
    kept = 100 * survived / len(cached)
    figures.append(Figure("cached_after_floods", kept, kept, kept, f"% of {len(cached)} verdicts", ">= 100"))
    return figures


def _flooded(gateway: Gateway, folder: Path, seconds: float, *, cores: int, name: str) -> list[Figure]:
    with _floods(gateway.lab, folder, cores):
        time.sleep(2)  # pause: the floods have filled what they can fill
        before, began = gateway.agent.metrics(), time.monotonic()
        times, tried = _connect(gateway.lab, seconds, first=cores * 100_000)
        print(f"flooded {name}: {tried} connections, {_rates(gateway, before, time.monotonic() - began)}")
    p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
    share = 100 * len(times) / tried
    return [
        Figure(f"new_source_p99_ms_flooded_{name}", p99, p50, max(times), "ms (from: median)", "<= 20"),
        Figure(f"new_source_connected_flooded_{name}", share, share, share, f"% of {tried}", ">= 99.9"),
    ]


def _route(lab: Lab) -> None:
    namespaces.batch(lab.gateway, [f"route add {_PREFIX}/64 via {LITWARE.address6} dev {LITWARE.segment}"])
    namespaces.batch(lab.home(LITWARE), [f"route add local {_PREFIX}/64 dev lo"])


def _connect(lab: Lab, seconds: float, first: int) -> tuple[list[float], int]:
    """Connects every 10 ms from the next source. Returns the milliseconds of each connection that was made, and
    how many were tried."""
    times: list[float] = []
    tried, end = 0, time.monotonic() + seconds
    with namespaces.inside(lab.home(LITWARE)):
        while time.monotonic() < end:
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as client:
                client.settimeout(_LOST)
                client.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
                client.bind((f"{_PREFIX}{(first + tried) >> 16:x}:{(first + tried) & 0xFFFF:x}", 0))
                tried += 1
                began = time.perf_counter()
                with suppress(OSError):
                    client.connect((MAIL6, 25))
                    times.append((time.perf_counter() - began) * 1000)
            time.sleep(0.01)  # pause: the pace of the connections
    return times, tried


def _cached(gateway: Gateway) -> set[str]:
    """The third tenant's sources with a cached verdict."""
    listing = gateway.listing("allow6")
    return {word for word in listing.split() if word.startswith(_PREFIX[:-1])}


@contextmanager
def _floods(lab: Lab, folder: Path, cores: int) -> Iterator[None]:
    """Runs trafgen in both tenants' namespaces. It pins itself to the first `cores` cores, with a process on
    each."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for tenant, source, randomly in (
            (CONTOSO, "10.0.0.4", slice(26, 30)),
            (FABRIKAM, _OWN, slice(30, 38)),
        ):
            script = folder / f"{tenant.name}.trafgen"
            script.write_text(_script(lab, tenant, source, randomly))
            running.append(
                namespaces.start(
                    lab.home(tenant),
                    ["trafgen", "--dev", "eth0", "--conf", os.fspath(script), "--cpus", str(cores),
                     "--no-sock-mem"],
                    stderr=subprocess.DEVNULL, detached=True,
                )
            )  # fmt: skip
        yield
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGTERM)  # its children send; it waits for them
            process.wait()


def _script(lab: Lab, tenant: Tenant, source: str, randomly: slice) -> str:
    """A packet to port 25 whose bytes in `randomly` (from the Ethernet header on) are drawn anew each time."""
    from scapy.layers.l2 import Ether

    ether = Ether(src=link_address(lab.home(tenant), "eth0"), dst=link_address(lab.gateway, tenant.segment))
    frame = bytes(
        ether / segment(source, to=MAIL6 if ":" in source else MAIL4, sport=random.randrange(1024, 65536))
    )
    octets = [f"{octet:#04x}" for octet in frame]
    octets[randomly] = [f"drnd({randomly.stop - randomly.start})"]
    if ":" not in source:
        # The IP checksum covers the source, so trafgen calculates it for each packet.
        octets[24:26] = ["csumip(14, 33)"]
    return "{ " + ", ".join(octets) + " }\n"


def _rates(gateway: Gateway, before: dict[str, float], seconds: float) -> str:
    """How many packets of the floods met each verdict, per second, in words."""
    after = gateway.agent.metrics()
    rules = ("missed", "limited", "limited_all", "unknown", "unlearned")
    names = {rule: f'portward_screen_packets_total{{rule="{rule}"}}' for rule in rules}
    return ", ".join(f"{rule} {(after[name] - before[name]) / seconds:,.0f}/s" for rule, name in names.items())
