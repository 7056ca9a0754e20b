"""Bad rows that another tool wrote into the store of a running gateway: each is named, and affects no other
record."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import Any

from inputs.rows import row, write_rows
from portward.lab.agent import Agent, until
from portward.lab.demo import attachments, records
from portward.lab.topology import CONTOSO, FABRIKAM
from portward.model import Attachment, Subscription
from portward.store.codec import key_of

MACHINE = next(one for one in attachments(CONTOSO) if isinstance(one, Attachment))
OWNERS = [one for one in records() if isinstance(one, Subscription)]


def unreadable(agent: Agent) -> dict[str, Any]:
    result = agent.portward("status", "--json")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)["records_unreadable"]
    return found


def test_bad_rows_are_named_and_affect_no_other_record(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    assert agent.process is not None
    verdict = agent.explain(CONTOSO.segment, CONTOSO.address4)["reason"]
    huge = f'{{"subscription":"{OWNERS[1].id}","state":"requested","details":{{"volume":{2**64}}}}}'
    write_rows(
        agent.folder / "portward.db",
        row(key_of(MACHINE), '{"segment":"a\\u0000b"}'),
        row(f"exemptions/{OWNERS[1].id}", huge),
        row("attachments/vni7/10.0.0.1", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")),
    )
    until(lambda: unreadable(agent)["number"] == 3, "all three are named")
    until(lambda: agent.metrics()["portward_records_refused_total"] == 3, "each is counted")
    until(lambda: agent.metrics()["portward_records_unreadable"] == 3, "the gauge says so")
    text = agent.portward("status").stdout
    assert "records   3 RECORDS OF THE STORE CANNOT BE READ" in text
    assert f"exemptions/{OWNERS[1].id}: details.volume: expected a whole number of at most 1000000000000" in text
    assert agent.explain(CONTOSO.segment, CONTOSO.address4)["reason"] == verdict, "the one before stays in force"
    check = agent.portward("check")
    assert check.returncode == 1
    assert key_of(MACHINE) in check.stdout
    assert "3 records of the store cannot be read" in check.stderr
    # Applying the inventory again restores the right records, and removes the bad ones.
    agent.apply(*records())
    with closing(sqlite3.connect(agent.folder / "portward.db")) as connection:
        left = connection.execute("SELECT count(*) FROM record WHERE key = 'attachments/vni7/10.0.0.1'").fetchone()
    assert left == (1,)
    until(lambda: unreadable(agent)["number"] == 2, "one was put right")
    assert agent.process.poll() is None
    assert agent.explain(FABRIKAM.segment, FABRIKAM.address4)["reason"]


def test_a_start_with_bad_rows_and_no_table_denies_what_they_are_about(agent: Agent) -> None:
    agent.apply(*records())
    write_rows(agent.folder / "portward.db", row(key_of(MACHINE), '{"segment":"a\\u0000b"}'))
    agent.start()
    until(lambda: unreadable(agent)["number"] == 1, "it is named")
    assert agent.explain(CONTOSO.segment, CONTOSO.address4)["reason"] == "denied-unknown-source"
    assert agent.explain(CONTOSO.segment, CONTOSO.address6)["reason"] == "allowed-offer"
