"""The rounds of the health check, which feed systemd's watchdog."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from portward.daemon import health
from portward.daemon.health import HealthCheck
from portward.daemon.steps import StepRunner
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
        screen=dict,
        reconciler=SimpleNamespace(loaded_at=0.0),
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
