"""A gateway whose policy table has a damaged row. The source of that row is denied, and everything else works."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from uuid import UUID

from kernel.conftest import ALLOWED, Gateway
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM
from portward.model import Attachment
from portward.policy import presets
from portward.table import layout
from portward.table.commits import Answers
from portward.table.writer import Writer

_YESTERDAY = datetime.now(UTC) - timedelta(days=1)


def damage(gateway: Gateway, address: str) -> None:
    """Writes an invalid code into a source's entry, and an expiry of an unknown subscription. No agent may run
    meanwhile."""
    writer = Writer(
        gateway.agent.folder / "table", presets.load("azure-2020"), Answers(observe=False, reject=False)
    )
    packed = bytes(map(int, address.split(".")))
    with writer._environment.begin(write=True) as transaction:
        entries, expiries = writer._parts[b"entries4"], writer._parts[b"expiries"]
        rows = [row for _, row in transaction.cursor(entries) if row[4:8] == packed]
        assert len(rows) == 1
        transaction.delete(b"r", rows[0], db=entries)
        transaction.put(b"r", rows[0][:-1] + b"\x1f", db=entries)
        transaction.put(b"r", layout.due(layout.microseconds(_YESTERDAY), 4711), db=expiries)
    writer.close()


def status(gateway: Gateway) -> dict[str, object]:
    found: dict[str, object] = json.loads(gateway.agent.portward("status", "--json").stdout)
    return found


def test_a_damaged_row_costs_its_source_and_no_start(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway: Gateway = make_gateway()
    owner = gateway.source(CONTOSO, "10.0.0.9", ALLOWED)
    gateway.source(CONTOSO, "10.0.0.10", ALLOWED)
    assert gateway.passes(CONTOSO, "10.0.0.9")
    assert gateway.passes(CONTOSO, "10.0.0.10")
    whole = gateway.agent.portward("check")
    assert "no damaged rows" in whole.stdout, whole.stderr
    assert whole.returncode == 0

    gateway.agent.stop()
    damage(gateway, "10.0.0.9")
    gateway.agent.start()
    # The agent finds that the kernel's cached verdict differs from the table's, and deletes it.
    until(lambda: not gateway.passes(CONTOSO, "10.0.0.9"), "the damaged source denied")
    assert gateway.passes(CONTOSO, "10.0.0.10")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    until(lambda: gateway.agent.metrics()["portward_table_rows_damaged_total"] >= 1, "the damage counted")
    until(lambda: gateway.agent.metrics()['portward_worker_events_total{event="damaged"}'] >= 1, "a worker met it")
    until(lambda: status(gateway)["table_rows_damaged_first"], "status names a row")
    until(lambda: bool(status(gateway)["table_rows_damaged"]), "the damage in the status")
    until(lambda: "DAMAGED ROW" in gateway.agent.portward("status").stdout, "status says so")
    done = gateway.agent.portward("check")
    assert done.returncode == 1
    assert "the code of the entry for 10.0.0.9/32" in done.stdout
    assert "systemctl stop portward" in done.stderr
    assert gateway.agent.portward("check", "--without-store").returncode == 0, "no start waits for that"

    gateway.source(CONTOSO, "10.0.0.11", ALLOWED)
    assert gateway.passes(CONTOSO, "10.0.0.11"), "changes go on"
    _attach_again(gateway, "10.0.0.9", owner)
    until(lambda: gateway.passes(CONTOSO, "10.0.0.9"), "the row written anew")


def _attach_again(gateway: Gateway, address: str, owner: UUID) -> None:
    """Changes the record of a source, so that the agent writes its row again."""
    gateway.agent.apply(
        Attachment(segment=CONTOSO.segment, address=ip_network(address), subscription=owner, started=_YESTERDAY)
    )
