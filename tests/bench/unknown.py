"""portward's worker against a minimal C program (`c_loop.c`), if every packet needs a verdict from user space.

Three readers have a queue each: the C loop, the worker with its batch reader, and the worker with NetfilterQueue.
In each turn, one reader after the other is stopped, its queue is filled, and it goes on until all packets have a
verdict. The figure counts the processor time of the reader, with the kernel's work in its name. So neither the
speed of the generator nor other work on the cores matters. All readers get the same packets in a turn, and turns
are compared one by one. Sources:

    unknown   random, without an attachment, none seen before
    prefix    random, from a prefix that may send
    known     a thousand hosts over and over
    scattered random, from a range with 21,846 attachments, where two thirds of the addresses have none. This is
              the worst case for the batch reader: it caches lookup results by the gap between attachments, and
              most sources here lie in a gap that is not cached.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import flood
from bench.figures import Figure
from bench.queueing import DRAINED, DRAINED_LENGTH, HOSTS, SCATTERED, Drained, Gateway

READERS = ("c_loop", "batch", "netfilterqueue")
_CLASSES = {
    "unknown": {"unknown"},
    "prefix": {"allow"},
    "known": {"allow", "deny"},
    "scattered": {"allow", "unknown"},
}
_DRAW = random.Random(25)
# Kind → a function that draws a random source of it.
_TRAFFIC: dict[str, Callable[[], bytes]] = {
    "unknown": lambda: bytes([_DRAW.randrange(20, 120), *_DRAW.randbytes(3)]),
    "prefix": lambda: bytes([10, _DRAW.randrange(64, 128), *_DRAW.randbytes(2)]),
    "known": lambda: _DRAW.choice(HOSTS),
    "scattered": lambda: _DRAW.choice(SCATTERED).to_bytes(4, "big"),
}


KINDS = tuple(_TRAFFIC)


def measure(folder: Path, rounds: int = 11) -> Iterator[Figure]:
    """`unknown_vs_c_loop` and so on: a worker's packets per second of processor time ÷ those of the C loop, median
    of the rounds."""
    c_loop = flood.build(folder, "c_loop.c", "-lnetfilter_queue")
    generator = flood.build(folder)
    with (
        Gateway(folder) as gateway,
        gateway.reader([str(c_loop), "0", str(DRAINED_LENGTH)]) as loop,
        gateway.worker("batch", 1, DRAINED_LENGTH) as batch,
        gateway.worker("netfilterqueue", 2, DRAINED_LENGTH) as single,
    ):
        pids = dict(zip(READERS, (loop, batch, single), strict=True))
        for kind, draw in _TRAFFIC.items():
            rates: dict[str, list[float]] = {reader: [] for reader in READERS}
            for _ in range(rounds):
                frames = gateway.frames(kind, [draw() for _ in range(DRAINED)])
                for queue, (reader, pid) in enumerate(pids.items()):
                    drained = gateway.drain(generator, frames, {queue: pid})
                    rates[reader].append(_rate(drained, _CLASSES[kind] if queue else {"unknown"}))
            print(f"{kind}: " + ", ".join(f"{name} {statistics.median(r):,.0f}/s" for name, r in rates.items()))
            yield from _figures(kind, rates)


def _rate(drained: Drained, expected: set[str]) -> float:
    """Packets in a second of processor time; raises RuntimeError if verdicts are of unexpected classes."""
    if set(drained.answered) != expected:
        raise RuntimeError(f"answered {drained.answered}, expected {sorted(expected)}")
    return sum(drained.answered.values()) / drained.processor_s


def _figures(kind: str, rates: dict[str, list[float]]) -> list[Figure]:
    found = []
    for reader, goal in (("batch", "" if kind == "scattered" else ">= 0.9"), ("netfilterqueue", "")):
        ratios = [ours / theirs for ours, theirs in zip(rates[reader], rates["c_loop"], strict=True)]
        name = f"{kind}_vs_c_loop" if reader == "batch" else f"{kind}_{reader}_vs_c_loop"
        unit = f"of the C loop, {statistics.median(rates[reader]):,.0f} packets per CPU second"
        found.append(Figure(name, statistics.median(ratios), min(ratios), max(ratios), unit, goal))
    return found
