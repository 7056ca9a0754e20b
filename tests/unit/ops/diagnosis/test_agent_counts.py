"""The counts of a subscription are read from the agent, and not from another process at its address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from portward.config.keys import Config
from portward.daemon.runtime import Runtime
from portward.ops.diagnosis import agent_counts
from portward.ops.diagnosis.facts import Metrics

CUSTOMER = UUID("11111111-0000-4000-8000-000000000002")
SCRAPE = f'portward_subscription_packets_total{{subscription="{CUSTOMER}",verdict="deny"}} 7.0\n'


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Runtime, Config]]:
    """A running agent and its settings. The process that has the address answers a scrape."""
    monkeypatch.setattr("portward.daemon.runtime.faulthandler.enable", lambda _: None)
    monkeypatch.setattr(agent_counts, "_read", lambda *_: SCRAPE)
    runtime = Runtime(tmp_path)
    yield runtime, Config(segments=("vni*",), uplinks=("up0",), table=tmp_path)
    runtime.close()


def status(**more: Any) -> dict[str, Any]:
    return {"format": 1, "started": "2026-01-09T12:00:00Z", **more}


def test_the_agents_counts_are_read(agent: tuple[Runtime, Config]) -> None:
    runtime, config = agent
    runtime.write_status(status(metrics_error=""))
    known, found = agent_counts.since_start(config, CUSTOMER)
    assert known is Metrics.READ
    assert found is not None
    assert found.refused == 7


def test_who_answers_in_the_agents_place_is_not_asked(agent: tuple[Runtime, Config]) -> None:
    """Two agents run on one host, and the other one has the address."""
    runtime, config = agent
    runtime.write_status(status(metrics_error="127.0.0.1:9125: Address already in use"))
    assert agent_counts.since_start(config, CUSTOMER) == (Metrics.UNREACHABLE, None)
