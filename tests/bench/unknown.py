"""Every packet a question to user space: portward's worker against the least that a C program can do (`c_loop.c`).

Three readers, each with a queue of its own: the C loop, the worker with its batch reader, the worker with
NetfilterQueue. One after the other, many times over, each is stopped, its queue is filled, and it goes on until
all is answered. What counts is the processor time of the reader, with what the kernel does in its name. So it
matters neither how fast the generator is nor what else keeps the cores busy. Turns are compared one by one: each
reader gets the same packets in a turn. Sources:

    unknown   drawn at random, of nobody, none seen before
    prefix    the same from a prefix that may send
    known     a thousand hosts over and over
    scattered drawn at random from among 21,846 attachments, two thirds of nobody: the worst for the batch reader,
              which remembers what it found by the gaps between attachments, and here meets ever new ones
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
# A source of each kind, drawn anew.
_TRAFFIC: dict[str, Callable[[], bytes]] = {
    "unknown": lambda: bytes([_DRAW.randrange(20, 120), *_DRAW.randbytes(3)]),
    "prefix": lambda: bytes([10, _DRAW.randrange(64, 128), *_DRAW.randbytes(2)]),
    "known": lambda: _DRAW.choice(HOSTS),
    "scattered": lambda: _DRAW.choice(SCATTERED).to_bytes(4, "big"),
}


KINDS = tuple(_TRAFFIC)


def measure(folder: Path, rounds: int = 11) -> Iterator[Figure]:
    """`unknown_vs_c_loop` and its like: packets of a worker in a second of its processor time ÷ those of the C
    loop, median of rounds."""
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
