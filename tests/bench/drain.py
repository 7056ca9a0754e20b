"""How fast full queues are emptied: one worker, two workers with a queue each, the C loop.

A generator that shares two cores with two workers would distort the result, so none runs meanwhile. It fills the
queues while their readers are stopped, and ends. The time runs from the moment that the readers go on until all
packets have their verdict. Each round has the same number of packets, from random sources that no attachment
covers. For two workers, each queue holds half of them. One worker has one core, two workers have both.
"""

from __future__ import annotations

import random
import statistics
from contextlib import ExitStack
from pathlib import Path

from bench import flood
from bench.figures import Figure
from bench.queueing import DRAINED, DRAINED_LENGTH, FLOOD_CPU, READER_CPU, Gateway

_PACKETS, _LENGTH = DRAINED, DRAINED_LENGTH


def measure(folder: Path, rounds: int = 15) -> list[Figure]:
    """`two_workers_vs_one` and `drain_vs_c_loop`: packets a second over packets a second, median of the rounds."""
    c_loop = flood.build(folder, "c_loop.c", "-lnetfilter_queue")
    generator = flood.build(folder)
    draw = random.Random(25)
    sources = [bytes([draw.randrange(20, 120), *draw.randbytes(3)]) for _ in range(_PACKETS)]
    seconds: dict[str, list[float]] = {"one": [], "two": [], "c_loop": []}
    with Gateway(folder) as gateway, ExitStack() as running:
        frames = gateway.frames("drain", sources)
        cpus = (READER_CPU, FLOOD_CPU)
        pids = [running.enter_context(gateway.worker("batch", queue, _LENGTH, cpus[queue])) for queue in (0, 1)]
        pids.append(running.enter_context(gateway.reader([str(c_loop), "2", str(_LENGTH)])))
        readers = {"one": {0: pids[0]}, "two": {0: pids[0], 1: pids[1]}, "c_loop": {2: pids[2]}}
        for _ in range(rounds):
            for name, by_queue in readers.items():
                seconds[name].append(gateway.drain(generator, frames, by_queue).wall_s)
    rates = {name: _PACKETS / statistics.median(found) for name, found in seconds.items()}
    print("drained: " + ", ".join(f"{name} {rate:,.0f}/s" for name, rate in rates.items()))
    return [
        _ratio("two_workers_vs_one", seconds["one"], seconds["two"], ">= 1.5"),
        _ratio("drain_vs_c_loop", seconds["c_loop"], seconds["one"], ">= 0.9"),
    ]


def _ratio(name: str, theirs: list[float], ours: list[float], goal: str) -> Figure:
    ratios = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
    unit = f"{_PACKETS / statistics.median(ours):,.0f} packets/s"
    return Figure(name, statistics.median(ratios), min(ratios), max(ratios), unit, goal)
