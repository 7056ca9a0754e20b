"""If something is wrong with the address or the clients of the metrics, the gateway still enforces."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.demo import records
from program.test_run import refused, ruleset

# Runs a command with the resolv.conf and hosts of a folder, which is the first argument.
RESOLVING = (
    "unshare", "-m", "sh", "-c",
    'mount --bind "$0/resolv.conf" /etc/resolv.conf && mount --bind "$0/hosts" /etc/hosts && exec "$@"',
)  # fmt: skip


def problem(agent: Agent) -> str:
    """The error of the metrics in `portward status`."""
    result = agent.portward("status", "--json")
    return str(json.loads(result.stdout)["metrics_error"]) if result.returncode == 0 else "no status"


@contextlib.contextmanager
def silent_resolver(agent: Agent) -> Iterator[socket.socket]:
    """A resolver in the gateway that never answers. Yields its socket, so that a test sees the queries."""
    (agent.folder / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    (agent.folder / "hosts").write_text("")
    with namespaces.inside(agent.lab.gateway):
        resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with resolver:
        resolver.bind(("127.0.0.53", 53))
        resolver.setblocking(False)
        yield resolver


def test_an_address_in_use_keeps_no_gateway_from_enforcing(agent: Agent) -> None:
    agent.apply(*records())
    with namespaces.inside(agent.lab.gateway):
        taken = socket.create_server(("127.0.0.1", 9125))
    with taken:
        checked = agent.portward("check")
        assert checked.returncode == 0
        assert "WARNING: metrics.address 127.0.0.1:9125: Address already in use" in checked.stdout
        agent.start()
        assert "chain classify" in ruleset(agent.lab)
        until(lambda: problem(agent) == "127.0.0.1:9125: Address already in use", "status says so")
        until(
            lambda: (
                "CANNOT BE SCRAPED at 127.0.0.1:9125: Address already in use" in agent.portward("status").stdout
            ),
            "status says so",
        )
    until(lambda: problem(agent) == "", "the address is tried again")
    until(lambda: agent.metrics()["portward_metrics_listen_retries_total"] >= 1, "failed tries are counted")
    assert agent.log.read_text().count("Address already in use") == 1
    assert "WARNING: metrics.address" not in agent.portward("check").stdout, "the agent itself has it now"


def test_an_address_that_comes_later_is_taken_then(agent: Agent) -> None:
    agent.apply(*records())
    agent.configure(metrics={"address": "192.0.2.125:9125"})
    assert "192.0.2.125:9125: Cannot assign requested address" in agent.portward("check").stdout
    agent.start()
    assert "chain classify" in ruleset(agent.lab)
    until(lambda: "Cannot assign requested address" in problem(agent), "status says so")
    namespaces.batch(agent.lab.gateway, ["address add 192.0.2.125/32 dev lo"])
    try:
        until(lambda: problem(agent) == "", "the address is tried again")
        with namespaces.inside(agent.lab.gateway):
            socket.create_connection(("192.0.2.125", 9125)).close()
    finally:
        namespaces.batch(agent.lab.gateway, ["address del 192.0.2.125/32 dev lo"])


@pytest.mark.parametrize("address", ["[::1]:9125", "127.0.0.1:9125", ":9125", "localhost:9125"])
def test_no_resolver_is_ever_asked(agent: Agent, address: str) -> None:
    agent.apply(*records())
    agent.configure(metrics={"address": address})
    with silent_resolver(agent) as resolver:
        agent.start(within=(*RESOLVING, str(agent.folder)))
        until(lambda: problem(agent) == "", "the metrics are there")
        with pytest.raises(BlockingIOError):
            resolver.recv(512)


def test_a_name_as_the_address_is_refused_by_check_and_run_alike(agent: Agent, tmp_path: Path) -> None:
    agent.apply(*records())
    agent.configure(metrics={"address": "gateway.example:9125"})
    line = refused(agent)
    assert f"{agent.config}:" in line
    assert "metrics.address: 'gateway.example:9125'" in line
    assert "no name is looked up" in line
    assert line in agent.portward("check").stderr
