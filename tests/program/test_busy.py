"""A locked store, a busy table or a bulk change is slow, but delays no repair, no start and no stop."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kernel.busy import busy_table
from portward.config.documents import enc_hook
from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.demo import attachments, records
from portward.lab.topology import CONTOSO
from portward.model import Record, Standing
from portward.store.codec import key_of
from program.test_run import ruleset, until_status, without_elements

_CONTOSO = records()[0]
_DISABLED = msgspec.structs.replace(_CONTOSO, standing=Standing.DISABLED)
_CACHED = "add element inet portward allow4 { vni1001 . 10.0.0.4 timeout 60s }"


def apply(agent: Agent, *records: Record) -> None:
    """Writes records to the store, without waiting for an agent."""
    lists: dict[str, list[Record]] = {}
    for record in records:
        lists.setdefault(key_of(record).partition("/")[0], []).append(record)
    text = msgspec.json.encode(lists, enc_hook=enc_hook).decode()
    result = agent.portward("apply", "-", text=text)
    assert result.returncode == 0, result.stderr


def status(agent: Agent) -> dict[str, Any]:
    """The output of `portward status --json`."""
    printed: dict[str, Any] = json.loads(until_status(agent))
    return printed


def comes_back(agent: Agent) -> None:
    """Deletes the ruleset and waits until it is back as it was."""
    before = without_elements(ruleset(agent.lab))
    namespaces.load(agent.lab.gateway, "delete table inet portward")
    until(lambda: without_elements(ruleset(agent.lab)) == before, "the ruleset is back")


def many() -> list[Record]:
    """More attachments than the agent loads without another process."""
    machine = attachments(CONTOSO)[0]
    return [
        msgspec.structs.replace(machine, segment="vni9", address=ip_network((0x0A000000 + number, 32)))
        for number in range(21_000)
    ]


@contextmanager
def busy(agent: Agent) -> Iterator[None]:
    """While this is open, the agent works on a change of policy that does not end."""
    with busy_table(agent.folder / "table"):
        apply(agent, _DISABLED)
        until(lambda: status(agent)["working"] is not None, "the agent is at the change")
        yield


def test_a_ruleset_comes_back_while_a_change_of_policy_goes_on(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    with busy(agent):
        comes_back(agent)
        assert agent.revision() == 1
        until(lambda: "reading the store for" in agent.portward("status").stdout, "status names what takes long")
    until(lambda: agent.revision() == 2, "the change is enforced")


def test_a_stop_does_not_wait_for_a_change_of_policy(agent: Agent) -> None:
    """The part of the change that was not committed is lost with the process, and the next agent loads it."""
    agent.apply(*records())
    agent.start()
    with busy(agent):
        assert agent.stop() == 0
    assert ruleset(agent.lab)
    agent.start()
    until(lambda: agent.revision() == 2, "the change is enforced")


def test_a_stop_does_not_wait_for_the_first_load_of_the_table(agent: Agent) -> None:
    agent.apply(*records(), *many())
    agent.start(wait=False)
    until(lambda: bulk_changes(agent) != [], "the table is loaded")
    (child,) = bulk_changes(agent)
    assert agent.stop() == 0
    assert not Path(f"/proc/{child}").exists()
    assert ruleset(agent.lab) == ""


def bulk_changes(agent: Agent) -> list[str]:
    """The ids of the agent's child processes that load a bulk change."""
    assert agent.process is not None
    found = subprocess.run(
        ["pgrep", "-P", str(agent.process.pid), "-f", "portward.daemon.bulk"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.split()


def test_a_locked_store_holds_up_neither_the_start_nor_a_repair(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    agent.stop()
    with contextlib.closing(sqlite3.connect(agent.folder / "portward.db", isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        agent.start()
        comes_back(agent)
        until(
            lambda: "held it locked" in status(agent)["store_error"], "the status says why the store is not read"
        )
        other.execute("ROLLBACK")
    until(lambda: status(agent)["store_error"] == "", "the store is read")
    with contextlib.closing(sqlite3.connect(agent.folder / "portward.db")) as other:
        assert other.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_what_keeps_wal_from_being_put_back_is_in_the_status(agent: Agent) -> None:
    agent.apply(*records())
    with contextlib.closing(sqlite3.connect(agent.folder / "portward.db", isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN")
        other.execute("SELECT * FROM record").fetchone()
        agent.start()
        until(
            lambda: "journal mode is delete, and WAL cannot be put back now" in agent.portward("status").stdout,
            "status says so",
        )
        other.execute("ROLLBACK")


@pytest.mark.parametrize("turn", range(3))
def test_a_denial_that_was_written_while_no_agent_ran_is_enforced_when_it_is_ready(
    agent: Agent, turn: int
) -> None:
    agent.apply(*records())
    agent.start()
    namespaces.load(agent.lab.gateway, _CACHED)
    agent.stop()
    apply(agent, _DISABLED)
    agent.start()
    revision = agent.revision()
    cached = agent.lab.run(agent.lab.gateway, "nft", "list", "set", "inet", "portward", "allow4").stdout
    assert (revision, "10.0.0.4" in cached) == (2, False)


def test_a_bulk_change_is_taken_in(agent: Agent) -> None:
    """A process of its own loads it. The daemon loads the next change itself again."""
    agent.apply(*records())
    agent.start()
    apply(agent, *many())
    until(lambda: agent.revision() == 2, "the bulk change is enforced", seconds=60)
    held = 21_000 + len(attachments(CONTOSO)) * 2
    # The agent writes its status each second.
    until(lambda: status(agent)["attachments"] == held, "the status counts it")
    assert agent.explain("vni9", "10.0.82.7")["reason"] == "allowed-offer"
    assert agent.apply(_DISABLED) == 3
    assert agent.explain("vni9", "10.0.82.7")["reason"] == "denied-disabled"
