"""Every packet a question to user space: portward's worker against the least that a C program can do (`c_loop.c`).

A flood on one core keeps a queue full, its reader has the other core. Three readers run beside each other, each
with a queue of its own: the C loop, the worker with its batch reader, the worker with NetfilterQueue. The flood
goes to one after the other, for a fraction of a second each, many times over; what comes back from the queue is
counted, over the same wall time, and compared turn by turn, so what else the machine does meets all of them.
Sources:

    unknown   drawn at random, of nobody, nearly each one never seen before
    prefix    the same from a prefix that may send
    known     a thousand hosts over and over
    scattered drawn at random from among 21,846 attachments, two thirds of nobody: the worst for the batch reader,
              which remembers what it found by the gaps between attachments, and here meets ever new ones
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

from bench import flood
from bench.figures import Figure
from bench.queueing import FLOOD_CPU, HOSTS, LENGTH, SCATTERED, Gateway
from portward.lab.agent import until

_SECONDS = 0.3
READERS = ("c_loop", "batch", "netfilterqueue")
_SOURCES = 200_000
_CLASSES = {
    "unknown": ("unknown",),
    "prefix": ("allow",),
    "known": ("allow", "deny"),
    "scattered": ("allow", "unknown"),
}


def measure(folder: Path, rounds: int = 11) -> list[Figure]:
    """`unknown_vs_c_loop` and its like: packets a second of a worker ÷ those of the C loop, median of rounds."""
    c_loop = flood.build(folder, "c_loop.c", "-lnetfilter_queue")
    generator = flood.build(folder)
    draw = random.Random(25)
    traffic = {
        "unknown": [bytes([draw.randrange(20, 120), *draw.randbytes(3)]) for _ in range(_SOURCES)],
        "prefix": [bytes([10, draw.randrange(64, 128), *draw.randbytes(2)]) for _ in range(_SOURCES)],
        "known": list(HOSTS),
        "scattered": [draw.choice(SCATTERED).to_bytes(4, "big") for _ in range(_SOURCES)],
    }
    figures = []
    with (
        Gateway(folder) as gateway,
        gateway.reader([str(c_loop), "0", str(LENGTH)]),
        gateway.worker("batch", 1),
        gateway.worker("netfilterqueue", 2),
    ):
        for kind, sources in traffic.items():
            going = flood.start(
                gateway.tenant, generator, gateway.frames(kind, sources), dev="eth0", cpu=FLOOD_CPU
            )
            rates: dict[str, list[float]] = {reader: [] for reader in READERS}
            try:
                for _ in range(rounds):
                    for queue, reader in enumerate(READERS):
                        expected = _CLASSES[kind] if queue else ("unknown",)
                        rates[reader].append(_rate(gateway, queue, expected))
            finally:
                sent = flood.finish(going, now=True)
            print(
                f"{kind}: {sent.packets / sent.seconds:,.0f}/s sent; "
                + ", ".join(f"{reader} {statistics.median(found):,.0f}/s" for reader, found in rates.items())
            )
            figures += _figures(kind, rates)
    return figures


def _rate(gateway: Gateway, queue: int, classes: tuple[str, ...]) -> float:
    """Packets a second that the reader of a queue answers; raises RuntimeError where their class is another."""
    gateway.queue_to(queue)
    until(lambda: gateway.waiting(queue) > LENGTH // 2, "the flood keeps the queue full")
    before, began = gateway.answered(), time.perf_counter()
    time.sleep(_SECONDS)
    after, seconds = gateway.answered(), time.perf_counter() - began
    counted = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    if set(counted) != set(classes):
        raise RuntimeError(f"queue {queue} answered {counted}, expected {classes}")
    return sum(counted.values()) / seconds


def _figures(kind: str, rates: dict[str, list[float]]) -> list[Figure]:
    found = []
    for reader, goal in (("batch", "" if kind == "scattered" else ">= 0.9"), ("netfilterqueue", "")):
        ratios = [ours / theirs for ours, theirs in zip(rates[reader], rates["c_loop"], strict=True)]
        name = f"{kind}_vs_c_loop" if reader == "batch" else f"{kind}_{reader}_vs_c_loop"
        unit = f"of the C loop, {statistics.median(rates[reader]):,.0f} packets/s"
        found.append(Figure(name, statistics.median(ratios), min(ratios), max(ratios), unit, goal))
    return found
