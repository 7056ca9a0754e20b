"""When `portward exemption revoke --wait` returns, no packet of the revoked subscription passes any more."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from datetime import UTC, date, datetime
from ipaddress import ip_network
from uuid import UUID, uuid4

import msgspec
import pytest

from kernel.conftest import LAB_KINDS, Gateway
from portward.lab import namespaces
from portward.lab.agent import PROGRAM, until
from portward.lab.topology import FABRIKAM
from portward.model import Attachment, Exemption, ExemptionState, Subscription

_GRANTED = datetime(2026, 1, 9, 12, tzinfo=UTC)


@pytest.fixture(scope="module", params=LAB_KINDS)
def lab_kind(request: pytest.FixtureRequest) -> str:
    """Each test once with a gateway that routes, and once with one that bridges."""
    return str(request.param)


def exempt(gateway: Gateway, source: str) -> UUID:
    """Gives a source a subscription with an exemption that is in force; gives the subscription's id."""
    id_ = uuid4()
    gateway.agent.apply(
        Subscription(id=id_, offer="pay-as-you-go", created=date(2022, 6, 30)),
        Exemption(subscription=id_, state=ExemptionState.GRANTED, requested=_GRANTED, decided=_GRANTED),
        Attachment(
            segment=FABRIKAM.segment, address=ip_network(source), subscription=id_,
            started=datetime(2026, 1, 10, tzinfo=UTC),
        ),
    )  # fmt: skip
    return id_


def test_when_it_returns_nothing_passes_any_more(gateway: Gateway) -> None:
    for number in range(8):
        source = f"10.0.2.{number}"
        id_ = exempt(gateway, source)
        assert gateway.passes(FABRIKAM, source)
        result = gateway.agent.portward("exemption", "revoke", str(id_), "--reason", "spam", "--wait")
        assert result.returncode == 0
        assert re.search(r"enforced after \d+\.\d ms$", result.stdout.splitlines()[0])
        for flags in ("A", "PA", "S"):
            assert not gateway.passes(FABRIKAM, source, flags)


def test_it_waits_for_the_workers_that_the_agent_has_and_not_for_those_of_the_file(gateway: Gateway) -> None:
    """A changed number of workers takes effect only at the agent's next start."""
    id_ = exempt(gateway, "10.0.2.50")
    kept = gateway.agent.config.read_text()
    gateway.agent.config.write_text(f"{kept}\n[queue]\nworkers = 3\n")
    try:
        result = gateway.agent.portward("exemption", "revoke", str(id_), "--reason", "spam", "--wait")
    finally:
        gateway.agent.config.write_text(kept)
    assert result.returncode == 0, result.stderr
    assert not gateway.passes(FABRIKAM, "10.0.2.50")


def test_it_waits_for_packets_that_workers_hold(gateway: Gateway) -> None:
    """A stopped worker may already have found a verdict for a packet, by the policy before the revocation."""
    id_ = exempt(gateway, "10.0.2.100")
    assert gateway.passes(FABRIKAM, "10.0.2.100")
    (worker,) = json.loads(gateway.agent.portward("status", "--json").stdout)["workers"]
    argv = [*PROGRAM, "exemption", "revoke", str(id_), "--reason", "spam", "--wait"]
    os.kill(worker["pid"], signal.SIGSTOP)
    try:
        process = namespaces.start(
            gateway.lab.gateway, [*argv, "--config", os.fspath(gateway.agent.config)], stdout=subprocess.PIPE
        )
        until(lambda: not gateway.passes(FABRIKAM, "10.0.2.100", "A", patience_s=0), "it is revoked in the kernel")
        time.sleep(0.3)  # pause: by now it would have ended too early
        assert process.poll() is None, "it waits for the worker"
    finally:
        with contextlib.suppress(ProcessLookupError):  # the self-check may have put another in its place
            os.kill(worker["pid"], signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"enforced after" in out


def test_many_at_once_too(gateway: Gateway) -> None:
    ids = [exempt(gateway, f"10.0.3.{number}") for number in range(12)]
    listed = gateway.agent.folder / "ids"
    listed.write_text("\n".join(map(str, ids)))
    result = gateway.agent.portward(
        "exemption",
        "revoke",
        "--file",
        os.fspath(listed),
        "--reason",
        "spam",
        "--confirm",
        "12",
        "--wait",
        "--json",
    )
    assert json.loads(result.stdout)["revoked"] == 12
    for number in range(12):
        assert not gateway.passes(FABRIKAM, f"10.0.3.{number}")


def test_an_agent_that_follows_another_store_is_not_waited_for(gateway: Gateway) -> None:
    """Such an agent would never enforce this store's revision, and its own revision is of another store."""
    id_ = exempt(gateway, "10.0.4.1")
    config = gateway.agent.folder / "other.toml"
    settings = msgspec.toml.decode(gateway.agent.config.read_bytes())
    config.write_bytes(msgspec.toml.encode(settings | {"store": f"sqlite:{gateway.agent.folder}/other.db"}))
    inventory = gateway.agent.portward("export").stdout

    def other(*arguments: str, text: str | None = None) -> tuple[int, str]:
        argv = [*PROGRAM, *arguments, "--config", os.fspath(config)]
        result = namespaces.run(gateway.lab.gateway, argv, text=text)
        return result.returncode, result.stderr

    assert other("apply", "-", text=inventory) == (0, "")
    code, output = other("exemption", "revoke", str(id_), "--reason", "spam", "--wait")
    assert code == 1
    assert "has not loaded the policy in" in output
    assert "nothing was written" in output
    assert gateway.passes(FABRIKAM, "10.0.4.1")
