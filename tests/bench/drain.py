"""How fast full queues are emptied: one worker, two workers with a queue each, the C loop.

A generator that shares two cores with two workers would show nothing, so there is none: the queues are filled
while their readers are stopped, the generator ends, and the time runs from the moment that the readers go on
until all is answered. The same number of packets each time, of sources of nobody drawn at random; for two workers
half of them in each queue. A worker has one core, two workers have both. What is looked at meanwhile is a
counter, every millisecond.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from bench import flood
from bench.figures import Figure
from bench.queueing import FLOOD_CPU, READER_CPU, Gateway
from portward.lab.agent import until

# As many as the socket of a reader holds: it has 8 MiB for messages, and the kernel grants twice that.
_PACKETS = 16_000
_LENGTH = 20_000


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
                seconds[name].append(_drain(gateway, generator, frames, by_queue))
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


def _drain(gateway: Gateway, generator: Path, frames: Path, readers: dict[int, int]) -> float:
    """Seconds in which the readers, by queue, answer what was queued for them; raises RuntimeError where the
    kernel has dropped any of it."""
    gateway.queue_to(*readers)
    before = sum(gateway.answered().values())
    for pid in readers.values():
        os.kill(pid, signal.SIGSTOP)
    try:
        flood.run(gateway.tenant, generator, frames, dev="eth0", cpu=FLOOD_CPU, count=_PACKETS)
        if (waiting := sum(gateway.waiting(queue) for queue in readers)) != _PACKETS:
            raise RuntimeError(f"{waiting} of {_PACKETS} packets wait")
    finally:
        began = time.perf_counter()
        for pid in readers.values():
            os.kill(pid, signal.SIGCONT)
    while sum(gateway.answered().values()) - before < _PACKETS:
        if time.perf_counter() - began > 10:
            raise TimeoutError("the queues are not empty after 10 s")
        time.sleep(0.001)
    seconds = time.perf_counter() - began
    until(lambda: not any(gateway.waiting(queue) for queue in readers), "nothing waits")
    return seconds
