"""The heartbeat shows whether a thread makes progress, or is stuck at one step."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from portward.base import heartbeat as module
from portward.base.heartbeat import Heartbeat, Lane, beat


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monotonic clock, which a test moves forward."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def test_an_idle_lane_is_never_stuck(clock: SimpleNamespace) -> None:
    lane = Lane("kernel", 30)
    assert lane.step(lambda: 7) == 7
    clock.now += 1000
    assert not lane.stuck
    assert lane.silent_for() == 0


def test_a_step_without_a_beat_is_stuck_beyond_its_bound(clock: SimpleNamespace) -> None:
    lane = Lane("kernel", 30)

    def work() -> None:
        clock.now += 30
        assert not lane.stuck
        clock.now += 1
        assert lane.stuck
        assert lane.silent_for() == 31

    lane.step(work)
    assert not lane.stuck


def test_a_step_that_beats_may_take_any_time(clock: SimpleNamespace) -> None:
    lane = Lane("policy", 60)

    def work() -> None:
        for _ in range(100):
            clock.now += 59
            beat()
            assert not lane.stuck

    lane.step(work)


def test_a_step_that_fails_is_over(clock: SimpleNamespace) -> None:
    lane = Lane("counting", 30)
    with pytest.raises(ZeroDivisionError):
        lane.step(lambda: 1 / 0)
    clock.now += 1000
    assert not lane.stuck


def test_a_beat_counts_for_the_lane_of_its_thread_alone(clock: SimpleNamespace) -> None:
    heartbeat = Heartbeat()
    begun, free = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        free.wait()

    kernel = threading.Thread(target=heartbeat.kernel.step, args=(hang,))
    kernel.start()
    begun.wait()

    def policy() -> None:
        clock.now += 45
        beat()

    heartbeat.policy.step(policy)
    beat()
    found = heartbeat.stuck()
    free.set()
    kernel.join()
    assert found == ["the kernel thread has been at one step for 45 s without getting further"]
    assert heartbeat.stuck() == []
