"""The restore drill of `docs/how-to/restore.md`, with a real agent and real packets' verdicts."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import UUID

import pytest

from portward.lab.agent import Agent, until
from portward.lab.topology import CONTOSO
from portward.model import Attachment, Exemption, ExemptionState, Reason, Subscription
from portward.table.reader import Reader

CUSTOMER = UUID(int=7)
GRANTED = datetime.now(UTC) - timedelta(days=2)
EARLY = date(2022, 1, 1)
PARTS = ("portward.db-wal", "portward.db-shm")


def sql(database: Path, command: str) -> None:
    """Does what `sqlite3` does with a command of an operator: a statement, `.backup FILE` or `.restore FILE`."""
    word, _, name = command.partition(" ")
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        if word in (".backup", ".restore"):
            with closing(sqlite3.connect(name)) as other:
                source, target = (connection, other) if word == ".backup" else (other, connection)
                source.backup(target)
        else:
            connection.execute(command)


def store(agent: Agent) -> Path:
    """The agent's store."""
    return agent.folder / "portward.db"


def reason(agent: Agent) -> Reason:
    """The reason code that workers find for the customer's machine."""
    with closing(Reader.open(agent.folder / "table")) as reader:
        holding = reader.holding(CONTOSO.segment, ip_address("10.0.1.1"))
    assert holding is not None
    return holding.entry.reason


def holds(agent: Agent, source: str) -> Reason | None:
    """The reason code that workers find for a source; None if no attachment covers it."""
    with closing(Reader.open(agent.folder / "table")) as reader:
        holding = reader.holding(CONTOSO.segment, ip_address(source))
    return None if holding is None else holding.entry.reason


def status(agent: Agent) -> dict[str, object]:
    """The agent's status."""
    printed: dict[str, object] = json.loads(agent.portward("status", "--json").stdout)
    return printed


def live(agent: Agent, backup: Path) -> None:
    """Restores while the agent runs: SQLite writes the backup into the open database."""
    sql(store(agent), f".restore {backup}")


def stopped(agent: Agent, backup: Path) -> None:
    """Restores after the agent was stopped. The files beside the store are removed with it."""
    agent.stop()
    for name in PARTS:
        (agent.folder / name).unlink(missing_ok=True)
    shutil.copy(backup, store(agent))


def killed(agent: Agent, backup: Path) -> None:
    """Restores after the agent was killed. It left files beside the store, which are removed with it."""
    assert agent.process is not None
    agent.process.kill()
    agent.process.wait()
    agent.stop()
    for name in PARTS:
        (agent.folder / name).unlink(missing_ok=True)
    shutil.copy(backup, store(agent))


def moved_in(agent: Agent, backup: Path) -> None:
    """Restores while the agent runs: another file replaces the store's."""
    fresh = agent.folder / "fresh.db"
    shutil.copy(backup, fresh)
    for name in PARTS:
        (agent.folder / name).unlink(missing_ok=True)
    fresh.replace(store(agent))


@pytest.fixture
def granted(agent: Agent) -> Agent:
    """A running agent. Its store has a customer with a machine and, since revision 2, a grant. The backup has
    both."""
    machine = Attachment(
        segment=CONTOSO.segment, address=ip_network("10.0.1.1"), subscription=CUSTOMER,
        started=GRANTED + timedelta(days=1),
    )  # fmt: skip
    customer = Subscription(id=CUSTOMER, offer="pay-as-you-go", created=date(2022, 1, 1))
    agent.apply(customer, machine)
    agent.start()
    agent.apply(Exemption(subscription=CUSTOMER, state=ExemptionState.GRANTED, requested=GRANTED, decided=GRANTED))
    return agent


def head(agent: Agent) -> str:
    """The head of the log, as `portward audit` prints it for `--expect`."""
    return str(json.loads(agent.portward("audit", "--check", "--json").stdout)["head"])


@pytest.mark.parametrize("way", [live, stopped, killed, moved_in], ids=lambda way: way.__name__)
@pytest.mark.parametrize("command", [".backup {}", "VACUUM INTO '{}'"])
def test_a_backup_is_restored_and_nothing_of_the_lost_history_stays(
    granted: Agent, way: Callable[[Agent, Path], None], command: str
) -> None:
    """The backup holds the grant. The revocation after it is lost by the restore. The next revision of the
    restored store has the same number as the lost one."""
    agent, backup = granted, granted.folder / "backup.db"
    sql(store(agent), command.format(backup))
    mark = head(agent)
    lost = agent.portward("exemption", "revoke", str(CUSTOMER), "--reason", "lost", "--wait")
    assert lost.returncode == 0, lost.stderr
    assert reason(agent) is Reason.DENIED_REVOKED
    way(agent, backup)
    if agent.process is None or agent.process.poll() is not None:
        agent.start()
    until(lambda: reason(agent) is Reason.ALLOWED_EXEMPT, "the restored grant is in force")
    until(lambda: status(agent)["revision"] == 2 and bool(status(agent)["in_step"]), "in step")
    until(lambda: status(agent)["history_replaced"] == 1, "status says so")
    until(lambda: agent.metrics()["portward_store_history_replaced_total"] == 1, "another history is counted")
    assert (
        "the store has another history than the policy table, which was read at revision 3"
        in agent.log.read_text()
    )
    assert agent.portward("audit", "--check", "--expect", mark).returncode == 0
    again = agent.portward("exemption", "revoke", str(CUSTOMER), "--reason", "again", "--wait")
    assert again.returncode == 0, again.stderr
    assert reason(agent) is Reason.DENIED_REVOKED
    assert head(agent).startswith("3:")


def test_a_restore_that_flips_too_many_waits_for_a_confirmation_on_this_gateway(agent: Agent) -> None:
    """The backup contains an older confirmation, which must not count."""
    backup = agent.folder / "backup.db"
    customers = [Subscription(id=UUID(int=n), offer="enterprise-agreement", created=EARLY) for n in range(20, 40)]
    machines = [
        Attachment(segment=CONTOSO.segment, address=ip_network(f"10.0.1.{n}"), subscription=UUID(int=n))
        for n in range(20, 40)
    ]
    agent.apply(*customers, confirm=True)
    sql(store(agent), f".backup {backup}")
    agent.start()
    agent.apply(*machines)
    assert holds(agent, "10.0.1.20") is not None
    live(agent, backup)
    until(lambda: status(agent)["held"] is not None, "it is held")
    plain = agent.portward("status").stdout
    assert "`portward apply --confirm` lets it through" in plain
    assert holds(agent, "10.0.1.20") is not None, "the policy before the restore"
    confirmed = agent.portward("apply", "--confirm")
    assert confirmed.returncode == 0, confirmed.stderr
    until(lambda: status(agent)["held"] is None and bool(status(agent)["in_step"]), "it is in force")
    assert holds(agent, "10.0.1.20") is None
    said = agent.portward("audit").stdout
    assert "confirmed everything up to revision 2, in place of another history" in said


def test_a_plain_copy_beside_the_newer_log_of_writes_restores_nothing(granted: Agent) -> None:
    """SQLite applies the write-ahead log beside the file, so the newer state is back, and `--expect` reports
    that."""
    agent, backup = granted, granted.folder / "backup.db"
    sql(store(agent), "PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(store(agent), backup)
    mark = head(agent)
    revoked = agent.portward("exemption", "revoke", str(CUSTOMER), "--reason", "spam", "--wait")
    assert revoked.returncode == 0, revoked.stderr
    shutil.copy(backup, store(agent))
    until(lambda: bool(status(agent)["in_step"]), "in step")
    assert reason(agent) is Reason.DENIED_REVOKED
    assert head(agent) != mark
    agent.stop()
    agent.start()
    assert reason(agent) is Reason.DENIED_REVOKED


def test_a_start_without_store_on_a_table_of_another_version_says_what_it_needs(granted: Agent) -> None:
    agent = granted
    agent.stop()
    table = agent.folder / "table"
    older(table)
    store(agent).unlink()
    agent.start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(60) != 0
    said = agent.log.read_text().splitlines()[-1]
    assert f"the policy table in {table} was written by another version of portward" in said
    assert "no such file: put it back from a backup" in said


def older(table: Path) -> None:
    """Gives the table's head another format number."""
    import lmdb  # here, because only this test writes a foreign table

    with closing(lmdb.open(str(table), max_dbs=64)) as environment, environment.begin(write=True) as transaction:
        value = transaction.get(b"head")
        assert value is not None
        transaction.put(b"head", b"\x02\x00" + value[2:100])
