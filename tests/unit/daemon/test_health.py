"""The rounds of the health check, which feed systemd's watchdog."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from portward.daemon import health
from portward.daemon.health import HealthCheck
from portward.daemon.steps import Step, StepRunner
from portward.dataplane.selfcheck import DifferenceKind, SelfCheck
from portward.ipc.probe import Prober

STUCK = "the counting thread has been at one step for 31 s without getting further"


def test_a_counting_thread_that_hangs_is_named_and_no_sooner_the_end_of_the_agent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A round does not wait for the counting thread, because a slow step must not starve the watchdog before its
    bound."""
    said: list[str] = []
    monkeypatch.setattr(health, "notify", said.append)
    monkeypatch.setattr(health, "watchdog_seconds", lambda: 0.1)
    monkeypatch.setattr(health, "ANSWER_TIMEOUT_S", 0.01)
    stuck: list[str] = []
    well: list[bool] = []
    core = SimpleNamespace(
        counting=SimpleNamespace(screen=dict),
        dataplane=SimpleNamespace(reconciler=SimpleNamespace(loaded_at=0.0)),
        selfcheck=SimpleNamespace(well=lambda: well.append(True)),
    )

    async def life() -> None:
        hangs, calls = asyncio.Event(), 0

        async def count_step(_: Callable[[], dict[str, int]]) -> dict[str, int]:
            nonlocal calls
            calls += 1
            await hangs.wait()
            return {"answered": 1}

        found = HealthCheck(cast(Any, core), [], count_step, lambda: stuck, StepRunner())
        for _ in range(2):
            await asyncio.wait_for(found._round(cast(Prober, None)), 30)
        assert said == ["WATCHDOG=1"] * 2
        stuck.append(STUCK)
        await asyncio.wait_for(found._round(cast(Prober, None)), 30)
        assert said == ["WATCHDOG=1"] * 2
        assert STUCK in caplog.text
        assert (calls, well) == (1, []), "one question waits, and nobody has answered"
        stuck.clear()
        hangs.set()
        await asyncio.wait_for(found._round(cast(Prober, None)), 30)
        assert (said, well) == (["WATCHDOG=1"] * 3, [True])

    asyncio.run(life())


# --- rounds with workers ---


class Queried:
    """A worker that handles the query that it gets, unless `hangs`."""

    def __init__(self, queue: int) -> None:
        self.queue, self.ready, self.answers, self.silences = queue, True, False, 0
        self.process, self.packets, self.kills, self.hangs = object(), 0, 0, False
        self.counters = SimpleNamespace(handled=lambda: self.packets)

    def kill(self) -> None:
        """Counts it."""
        self.kills += 1


class Lab:
    """A health check of two workers, with a prober that delivers each query, unless `trouble` is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watchdog: float | None = 0.1) -> None:
        self.workers = [Queried(7), Queried(8)]
        self.queries: list[tuple[int, int]] = []
        self.notified: list[str] = []
        self.stuck: list[str] = []
        self.trouble: OSError | None = None
        self.closed = False
        self.on_query: Callable[[Queried], object] = lambda worker: None
        self.answered = {"answered": 0, "answered_stale": 0}
        self.core = SimpleNamespace(
            counting=SimpleNamespace(screen=dict),
            dataplane=SimpleNamespace(loaded_at=0.0, preset=SimpleNamespace(ports=(25,))),
            selfcheck=SelfCheck(),
        )
        self.steps = StepRunner(itertools.count(0.0, 100.0).__next__)  # no step waits after a failure
        monkeypatch.setattr(health, "notify", self.notified.append)
        monkeypatch.setattr(health, "watchdog_seconds", lambda: watchdog)
        monkeypatch.setattr(health, "ANSWER_TIMEOUT_S", 0.02)
        monkeypatch.setattr(health, "Prober", lambda: self)
        self.check = HealthCheck(
            cast(Any, self.core), cast(Any, self.workers), self.count_step, lambda: self.stuck, self.steps
        )

    async def count_step(self, _: Callable[[], dict[str, int]]) -> dict[str, int]:
        return dict(self.answered)

    def ask(self, place: int, port: int) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.queries.append((place, port))
        worker = self.workers[place]
        worker.packets += not worker.hangs
        self.on_query(worker)

    def close(self) -> None:
        self.closed = True

    def round(self) -> float:
        """One round. Returns the pause after it."""
        return asyncio.run(self.check._round(cast(Prober, self)))

    @property
    def differences(self) -> dict[DifferenceKind, int]:
        """The counted differences, without those that are 0."""
        return {kind: times for kind, times in self.core.selfcheck.divergences.items() if times}


@pytest.mark.parametrize(("watchdog", "notified", "longest"), [(0.1, ["WATCHDOG=1"], 0.025), (None, [], 2.0)])
def test_each_worker_gets_a_query_and_the_watchdog_is_fed_four_times_per_interval(
    monkeypatch: pytest.MonkeyPatch, watchdog: float | None, notified: list[str], longest: float
) -> None:
    """Without a watchdog the round comes every two seconds, and systemd gets nothing."""
    lab = Lab(monkeypatch, watchdog)
    assert 0 < lab.round() <= longest
    assert lab.queries == [(0, 25), (1, 25)]
    assert [worker.answers for worker in lab.workers] == [True, True]
    assert (lab.notified, lab.differences) == (notified, {})


def test_a_silent_worker_is_ended_after_1_2_4_and_8_rounds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its replacements are silent too, so in the other rounds the log names another cause than the worker."""
    lab = Lab(monkeypatch)
    well, silent = lab.workers
    silent.hangs = True
    kills = []
    for _ in range(8):
        assert lab.round() == 0.5
        kills.append(silent.kills)
    assert kills == [1, 2, 2, 3, 3, 3, 3, 4]
    assert (well.answers, well.kills, silent.answers) == (True, 0, False)
    assert lab.differences == {DifferenceKind.WORKER: 8}
    assert lab.notified == []
    assert "the worker of queue 8 does not answer: it is ended" in caplog.text
    assert "no query has reached the worker of queue 8" in caplog.text
    silent.hangs = False
    lab.round()
    assert (silent.answers, silent.silences, lab.notified) == (True, 0, ["WATCHDOG=1"])


def test_an_answer_that_comes_late_but_within_the_timeout_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch)
    monkeypatch.setattr(health, "ANSWER_TIMEOUT_S", 60.0)
    late = lab.workers[1]
    late.hangs = True

    def answer() -> None:
        late.packets += 1

    lab.on_query = lambda worker: asyncio.get_running_loop().call_later(0.02, answer) if worker is late else None
    lab.round()
    assert (late.answers, late.kills) == (True, 0)


@pytest.mark.parametrize("what", [{"process": object()}, {"ready": False}], ids=["replaced", "ended"])
def test_a_worker_that_ends_after_the_query_was_not_silent(
    monkeypatch: pytest.MonkeyPatch, what: dict[str, object]
) -> None:
    """Its replacement got no query, so it must not be ended."""
    lab = Lab(monkeypatch)
    ended = lab.workers[1]
    ended.hangs = True
    lab.on_query = lambda worker: vars(worker).update(what) if worker is ended else None
    lab.round()
    assert ended.kills == 0
    assert lab.differences == {}


def test_a_query_that_a_reloaded_ruleset_may_have_dropped_is_repeated_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = Lab(monkeypatch)
    lab.workers[0].hangs = True
    lab.core.dataplane.loaded_at = math.inf
    assert lab.round() == 0.0
    assert (lab.workers[0].kills, lab.differences, lab.notified) == (0, {}, [])


def test_a_worker_that_still_starts_is_not_queried_and_the_watchdog_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = Lab(monkeypatch)
    lab.workers[0].ready = False
    lab.round()
    assert (lab.queries, lab.notified) == ([(1, 25)], [])


def test_queries_that_cannot_be_sent_end_no_worker_and_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is unknown then whether the workers answer. Once queries were sent again, the next failure is logged."""
    lab = Lab(monkeypatch)
    for trouble, logged in ((True, 1), (True, 1), (False, 1), (True, 2)):
        lab.trouble = OSError(100, "Network is down") if trouble else None
        lab.round()
        assert caplog.text.count("ip link set lo up") == logged
        assert [worker.answers for worker in lab.workers] == [not trouble] * 2
    assert [worker.kills for worker in lab.workers] == [0, 0]


def test_the_third_round_of_answers_under_another_policy_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round without answers of either kind neither counts nor resets. A right answer resets."""
    lab = Lab(monkeypatch)
    fed = []
    for new in ("answered_stale", "answered_stale", "", "answered_stale", "answered"):
        if new:
            lab.answered[new] += 1
        before = len(lab.notified)
        lab.round()
        fed.append(len(lab.notified) - before)
        assert (lab.core.selfcheck.answered is not None) == (new == "answered")
    assert fed == [1, 1, 1, 0, 1]
    assert lab.differences == {DifferenceKind.ANSWER: 1}


def test_threads_that_hang_are_logged_once_and_so_is_their_recovery(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lab = Lab(monkeypatch)
    for stuck in ([STUCK], [STUCK], [], []):
        lab.stuck = stuck
        lab.round()
    assert caplog.text.count(STUCK) == 1
    assert caplog.text.count("all threads make progress again") == 1
    assert len(lab.notified) == 2


def test_a_round_that_fails_does_not_feed_the_watchdog_and_the_next_one_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end of the job closes the prober."""
    lab = Lab(monkeypatch)
    monkeypatch.setattr(health, "_RETRY_S", 0.001)
    failures = [OverflowError("unexpected"), OverflowError("unexpected")]

    def fail(_: Queried) -> None:
        if failures:
            raise failures.pop()

    lab.on_query = fail

    async def life() -> None:
        fed = asyncio.Event()
        monkeypatch.setattr(health, "notify", lambda _: fed.set())
        running = asyncio.ensure_future(lab.check.run())
        await asyncio.wait_for(fed.wait(), 60)
        assert lab.steps.failures[Step.SELF_CHECK] == 2
        assert not lab.steps.is_failing(Step.SELF_CHECK)
        running.cancel()
        await asyncio.wait({running})

    asyncio.run(life())
    assert lab.closed
