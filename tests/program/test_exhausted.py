"""An agent without a free descriptor or thread still enforces, repairs its ruleset, and ends at SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from portward.lab import namespaces
from portward.lab.agent import PROGRAM, Agent, until
from portward.lab.demo import records
from portward.lab.topology import CONTOSO
from portward.model import Standing, Subscription
from program import greedy
from program.test_run import ruleset

IDLE = 2_000
LIMIT = 256
# Several rounds, because a descriptor may happen to be free for the first repair.
ROUNDS = 3


@contextlib.contextmanager
def idle_connections(agent: Agent, number: int) -> Iterator[None]:
    """Clients of the metrics that connect and send nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, number + 500)), hard))
    try:
        with contextlib.ExitStack() as stack:
            with namespaces.inside(agent.lab.gateway):
                for _ in range(number):
                    stack.enter_context(socket.create_connection(("127.0.0.1", 9125), timeout=30))
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def greedy_agent(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent that uses up its descriptors or threads when it gets a signal."""
    monkeypatch.setenv("PYTHONPATH", str(Path(greedy.__file__).parent))
    agent.apply(*records())
    agent.start()
    status(agent)
    return agent


def status(agent: Agent) -> dict[str, Any]:
    """The output of `portward status --json`, once there is a status."""
    until(lambda: agent.portward("status").returncode == 0, "there is a status")
    printed: dict[str, Any] = json.loads(agent.portward("status", "--json").stdout)
    return printed


def send_signal(agent: Agent, number: signal.Signals) -> None:
    """Sends the agent a signal."""
    assert agent.process is not None
    os.kill(agent.process.pid, number)


def revoked() -> Subscription:
    """A subscription of the demo that may send, with a standing that denies it."""
    found = next(one for one in records() if isinstance(one, Subscription) and one.name == "contoso-prod")
    return replace(found, standing=Standing.DISABLED)


def survives(agent: Agent) -> None:
    """Checks that the agent handles a revocation, a worker's end, a flushed ruleset, a scrape, a change of
    interfaces, and SIGTERM."""
    agent.apply(revoked(), confirm=True)
    assert str(agent.explain(CONTOSO.segment, CONTOSO.address4)["reason"]).startswith("denied")
    for ends in range(1, ROUNDS + 1):
        worker = status(agent)["workers"][0]["pid"]
        os.kill(worker, signal.SIGKILL)
        until(lambda ends=ends: agent.metrics()["portward_worker_restarts_total"] >= ends, "its end is seen")  # type: ignore[misc]
        until(lambda worker=worker: status(agent)["workers"][0]["pid"] not in (worker, None), "another is there")  # type: ignore[misc]
        until(lambda: status(agent)["workers"][0]["running"], "it runs")
        namespaces.load(agent.lab.gateway, "flush ruleset")
        until(lambda: "chain classify" in ruleset(agent.lab), "the ruleset is back")
    namespaces.batch(agent.lab.gateway, ["link add vni7777 type veth peer name peer7777"])
    try:
        until(lambda: any(one["name"] == "vni7777" for one in status(agent)["segments"]), "a new segment is seen")
    finally:
        namespaces.batch(agent.lab.gateway, ["link del vni7777"])
    assert "Traceback" not in agent.log.read_text()
    assert agent.stop() == 0


def test_idle_connections_cost_nothing(agent: Agent) -> None:
    agent.apply(*records())
    agent.start(within=("prlimit", f"--nofile=100:{LIMIT}"))
    assert f"may have {LIMIT} file descriptors" in agent.log.read_text(), "the soft limit is raised"
    with idle_connections(agent, IDLE):
        survives(agent)


def test_check_warns_of_few_descriptors(agent: Agent) -> None:
    agent.apply(*records())
    checked = namespaces.run(
        agent.lab.gateway,
        ["prlimit", f"--nofile={LIMIT}:{LIMIT}", *PROGRAM, "check", "--config", str(agent.config)],
    )
    assert checked.returncode == 0, checked.stderr
    assert f"WARNING: this process may have {LIMIT} file descriptors" in checked.stdout
    assert "file descriptors" not in agent.portward("check").stdout


def test_an_agent_without_a_free_descriptor_goes_on(greedy_agent: Agent) -> None:
    send_signal(greedy_agent, signal.SIGUSR2)
    survives(greedy_agent)


def test_an_agent_that_gets_no_thread_goes_on(greedy_agent: Agent) -> None:
    send_signal(greedy_agent, signal.SIGUSR1)
    survives(greedy_agent)
