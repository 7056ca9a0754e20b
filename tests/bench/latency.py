"""The latency of a source's first packet: SYNs through the real agent, each from a source without a cached
verdict.

This is the whole gateway of the lab, with its limits raised: tenant's VXLAN → `screen` → queue → worker → `learn`
→ routing → uplink. A prefix of the tenant may send, and every SYN comes from its next address. The clock starts
when the generator stamps the frame, just before it sends it. It ends when the kernel receives the frame behind the
gateway, by the kernel's own timestamp. So the time includes the send itself, both VXLAN ends, both veth pairs, and
all waiting for a core: generator, agent and worker share two. The gateway's address translation is removed,
because its cost would be measured too.

The host stops a virtual machine now and then, for milliseconds at a time, and all packets on their way wait. So
the packets that arrive are cut into rounds of some tenths of a second, each with its percentiles. The figure is
the median of the rounds. Its range goes from the best round to the percentile of all packets together, stops
included.
"""

from __future__ import annotations

import socket
import statistics
import struct
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from bench import flood
from bench.figures import Figure, percentile
from kernel.conftest import ALLOWED, Gateway, running_gateway, source_records
from kernel.wire import segment
from portward.lab import namespaces
from portward.lab.topology import CONTOSO

# Name → misses a second, rounds, and packets in each round.
_RATES = {"1k": (1_000, 8, 500), "10k": (10_000, 40, 1_000), "50k": (50_000, 12, 10_000)}
_QUEUE = {"rate": 10_000_000, "burst": 1_000_000, "segment_rate": 10_000_000, "segment_burst": 1_000_000}
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h
_SO_RCVBUFFORCE = 33
_STAMP = 14 + 20 + 20  # behind Ethernet, IPv4 and TCP headers
_TIME = struct.Struct("@qq")


def measure(folder: Path) -> Iterator[Figure]:
    """`first_syn_p50_us_at_1k` and so on: the 50th, 99th and 99.9th percentile at 1k, 10k and 50k misses a
    second."""
    program = flood.build(folder)
    with running_gateway(folder, queue=_QUEUE, verdicts={"segment_sources": 131_072}) as gateway:
        gateway.agent.apply(*source_records(CONTOSO, "10.64.0.0/10", ALLOWED, uuid4()))
        namespaces.run(gateway.lab.gateway, ["nft", "delete", "table", "inet", "lab"])
        frame = bytes(gateway.senders[CONTOSO].frame / segment("10.64.0.0") / bytes(8))
        first = 10 << 24 | 64 << 16
        for name, (rate, rounds, packets) in _RATES.items():
            count = rounds * packets
            sources = ((first + place).to_bytes(4, "big") for place in range(count))
            first += count
            frames = flood.write(folder / name, flood.from_sources(frame, sources))
            delays = _run(gateway, program, frames, rate, count)
            cut = [delays[start : start + packets] for start in range(0, len(delays), packets)]
            yield from _figures(name, cut, f"{count - len(delays)} of {count} lost")


def _run(gateway: Gateway, program: Path, frames: Path, rate: int, count: int) -> list[float]:
    """Sends `count` frames at `rate` a second. Returns, for each that arrives, the microseconds from its stamp to
    its reception."""
    with namespaces.inside(gateway.lab.internet):
        view = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    with view:
        view.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 30)
        view.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        view.bind(("eth0", 0))
        flood.run(
            gateway.lab.home(CONTOSO),
            program,
            frames,
            dev="eth0",
            cpu=0,
            pps=rate,
            batch=8,
            count=count,
            stamp=_STAMP,
        )  # fmt: skip
        view.settimeout(0.3)
        return _delays(view)


def _delays(view: socket.socket) -> list[float]:
    found: list[float] = []
    while True:
        try:
            data, ancillary, _, _ = view.recvmsg(128, 64)
        except TimeoutError:
            return found
        if data[23:24] == b"\x06" and data[36:38] == b"\x00\x19" and len(data) >= _STAMP + 8:
            seconds, nanoseconds = _TIME.unpack(ancillary[0][2])
            sent = int.from_bytes(data[_STAMP : _STAMP + 8], "big")
            found.append((seconds * 1_000_000_000 + nanoseconds - sent) / 1000)


def _figures(name: str, rounds: list[list[float]], lost: str) -> list[Figure]:
    figures = []
    for percent, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
        values = [percentile(delays, share) for delays in rounds]
        together = percentile([delay for delays in rounds for delay in delays], share)
        goal = "<= 300" if (percent, name) == ("p99", "10k") else ""
        unit = f"µs, median of {len(values)} rounds; {lost}"
        figures.append(
            Figure(
                f"first_syn_{percent}_us_at_{name}",
                statistics.median(values),
                min(values),
                together,
                unit,
                goal,
            )
        )
    return figures
