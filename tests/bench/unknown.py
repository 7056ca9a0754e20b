"""Every packet a question to user space: portward's worker against the least that a C program can do (`c_loop.c`).

A flood on one core keeps the queue full, the reader has the other core. What is counted is what comes back from
the queue, over the same wall time. The three readers take turns, some rounds of each, and are compared round by
round: the C loop, the worker with its batch reader, the worker with NetfilterQueue. Sources are

    unknown   drawn at random, of nobody: each one is looked up in the policy table by every prefix length
    prefix    drawn at random from an allowed prefix: the same
    known     a thousand hosts over and over: the memo of the batch reader knows them
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import AbstractContextManager
from pathlib import Path

from bench import flood
from bench.figures import Figure
from bench.queueing import FLOOD_CPU, HOSTS, LENGTH, Gateway
from portward.lab.agent import until

_SECONDS = 1.0
# Many times the sources that the worker remembers, so none of them is met again in time.
_SOURCES = 200_000
_CLASSES = {"unknown": ("unknown",), "prefix": ("allow",), "known": ("allow", "deny")}


def measure(folder: Path, rounds: int = 5) -> list[Figure]:
    """`unknown_vs_c_loop` and its like: packets a second of a worker ÷ those of the C loop, the median of the
    rounds."""
    c_loop = flood.build(folder, "c_loop.c", "-lnetfilter_queue")
    generator = flood.build(folder)
    draw = random.Random(25)
    traffic = {
        "unknown": [bytes([draw.randrange(20, 120), *draw.randbytes(3)]) for _ in range(_SOURCES)],
        "prefix": [bytes([10, draw.randrange(64, 128), *draw.randbytes(2)]) for _ in range(_SOURCES)],
        "known": list(HOSTS),
    }
    figures = []
    with Gateway(folder) as gateway:
        for kind, sources in traffic.items():
            rates: dict[str, list[float]] = {"c": [], "batch": [], "netfilterqueue": []}
            going = flood.start(
                gateway.tenant, generator, gateway.frames(kind, sources), dev="eth0", cpu=FLOOD_CPU
            )
            try:
                for _ in range(rounds):
                    for reader, found in rates.items():
                        running = (
                            gateway.reader([str(c_loop), "0", str(LENGTH)])
                            if reader == "c"
                            else gateway.worker(reader)
                        )
                        found.append(_rate(gateway, running, () if reader == "c" else _CLASSES[kind]))
            finally:
                sent = flood.finish(going, now=True)
            print(
                f"{kind}: {sent.packets / sent.seconds:,.0f}/s sent; "
                + ", ".join(f"{reader} {statistics.median(found):,.0f}/s" for reader, found in rates.items())
            )
            figures += _figures(kind, rates)
    return figures


def _rate(gateway: Gateway, reader: AbstractContextManager[int], classes: tuple[str, ...]) -> float:
    """Packets a second that a reader answers; raises RuntimeError where their class is not one of these."""
    with reader:
        until(lambda: gateway.waiting() > LENGTH // 2, "the flood keeps the queue full")
        before, began = gateway.answered(), time.perf_counter()
        time.sleep(_SECONDS)
        after, seconds = gateway.answered(), time.perf_counter() - began
    counted = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    if classes and set(counted) != set(classes):
        raise RuntimeError(f"answered {counted}, expected {classes}")
    return sum(counted.values()) / seconds


def _figures(kind: str, rates: dict[str, list[float]]) -> list[Figure]:
    found = []
    for reader, goal in (("batch", ">= 0.9"), ("netfilterqueue", ">= 0")):
        ratios = [ours / theirs for ours, theirs in zip(rates[reader], rates["c"], strict=True)]
        name = f"{kind}_vs_c_loop" if reader == "batch" else f"{kind}_{reader}_vs_c_loop"
        unit = f"of the C loop, {statistics.median(rates[reader]):,.0f} packets/s"
        found.append(Figure(name, statistics.median(ratios), min(ratios), max(ratios), unit, goal))
    return found
