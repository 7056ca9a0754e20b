"""The faults: each is a function that breaks one thing on a ground and gives what came of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from faults.ground import Ground, Outcome
from portward.lab.agent import until


class Fault(NamedTuple):
    """A fault under its name; `act` takes the ground and how hard to try (1: the short form)."""

    name: str
    act: Callable[[Ground, int], Iterator[Outcome]]


FAULTS: Final[dict[str, Callable[[Ground, int], Iterator[Outcome]]]] = {}


def fault(function: Callable[[Ground, int], Iterator[Outcome]]) -> Callable[[Ground, int], Iterator[Outcome]]:
    """Puts a fault into the list, under its name."""
    FAULTS[function.__name__.replace("_", "-")] = function
    return function


@fault
def kill_worker(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGKILL of a worker at a random moment, while policy changes."""
    for _ in range(rounds):
        yield ground.fault("SIGKILL of a worker", lambda: _while_changing(ground, _kill_workers))


@fault
def kill_daemon(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGKILL of the daemon at a random moment, while policy changes."""
    for _ in range(rounds):
        yield ground.fault("SIGKILL of the daemon", lambda: _while_changing(ground, _kill_daemon))


@fault
def kill_all(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGKILL of everything at a random moment, while policy changes."""

    def both(ground: Ground) -> None:
        _kill_workers(ground)
        _kill_daemon(ground)

    for _ in range(rounds):
        yield ground.fault("SIGKILL of all", lambda: _while_changing(ground, both))


def _kill_workers(ground: Ground) -> None:
    found = ground.agents.workers()
    for pid in found:
        ground.kill(pid)
    assert found, "there was no worker to kill"


def _kill_daemon(ground: Ground) -> None:
    before = ground.agents.starts
    ground.kill(ground.agents.pid)
    until(lambda: ground.agents.starts > before, "the daemon was started again")


def _while_changing(ground: Ground, act: Callable[[Ground], None]) -> None:
    with ground.changing():
        time.sleep(0.3 + ground.random.random() * 0.5)
        act(ground)


_ = signal
