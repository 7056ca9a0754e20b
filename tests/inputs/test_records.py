"""Rows that another tool wrote into the store. Only the bad row is refused, with a message that names its key and
the mistake. The other rows of its revision take effect, and the old record with that key stays in force."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import pytest

from inputs.corpus import Case, cases, one_line, portward
from inputs.held import Held, hold
from inputs.rows import row, write_rows
from portward.base.characters import unshown
from portward.model import Reason
from portward.policy import presets
from portward.store.sqlite.store import SqliteStore
from portward.table.commits import Answers
from portward.table.follower import Follower
from portward.table.writer import Writer
from unit.store.samples import CONTOSO, EXAMPLE, FABRIKAM

NOW: Final = datetime(2026, 6, 3, tzinfo=UTC)
RECORDS: Final = cases("records")
# Sources of the store that `hold` makes, with their reason codes; and one that is new in the bad row's revision.
OLD: Final = {(1, "10.0.0.4"): Reason.ALLOWED_OFFER, (2, "10.0.0.9"): Reason.ALLOWED_EXEMPT}
NEW: Final = (2, "192.0.2.7")
GOOD_ROW: Final = row(
    "attachments/vni1002/192.0.2.7",
    f'{{"segment":"vni1002","address":"192.0.2.7","subscription":"{CONTOSO.id}"}}',
)
# SQLite cannot be given these keys again, because they are no text or no UTF-8, so no later write removes them.
UNNAMED: Final = ("key-bytes", "key-not-utf-8")
# This policy asks for no restart after a grant, because no machine of the sample was started after its grant.
PRESET: Final = """\
name = "own"
title = "Own"
source = "none"
source_date = 2026-01-01
ports = [25]
internal = []
[[offers]]
ids = ["enterprise-agreement"]
title = "Enterprise Agreement"
exemption = "not-needed"
[[offers]]
ids = ["pay-as-you-go"]
title = "Pay-As-You-Go"
exemption = "self-service"
"""


def name(case: Case) -> str:
    """The name of a case in a report."""
    return case.path.stem


class Gateway:
    """A policy table that follows a store, as the daemon's does."""

    def __init__(self, folder: Path, held: Held) -> None:
        preset = folder / "own.toml"
        preset.write_text(PRESET)
        self.store = SqliteStore(held.store)
        self.writer = Writer(folder / "table", presets.load(str(preset)), Answers(observe=False, reject=False))
        self.follower = Follower(self.store, self.writer)
        self.follower.step(NOW)
        self.writer.put_links({1: ("vni1001", False), 2: ("vni1002", False)}, touched=frozenset(), now=NOW)

    def reason(self, link: int, address: str) -> Reason | None:
        """The reason code of a source; None if no attachment covers it."""
        found = self.writer.reader().owner(link, ip_address(address).packed)
        return None if found is None or found[1] is None else found[1].reason

    def close(self) -> None:
        """Closes table and store."""
        self.writer.close()
        self.store.close()


@pytest.fixture
def held(tmp_path: Path) -> Held:
    """A store that holds a policy."""
    return hold(tmp_path)


@pytest.fixture
def gateway(tmp_path: Path, held: Held) -> Iterator[Gateway]:
    """A gateway that has loaded that policy."""
    found = Gateway(tmp_path, held)
    assert {source: found.reason(*source) for source in OLD} == OLD
    assert found.reason(*NEW) is None
    yield found
    found.close()


def refusals(caplog: pytest.LogCaptureFixture, *, anew: bool = False) -> list[str]:
    """The daemon's log messages about refused records. Each must be one line without control characters, and say
    what follows. `anew`: the table was read from scratch."""
    start = f"record refused, {'its sources are denied' if anew else 'the one before stays in force'}: "
    lines = [one_line(record.getMessage()) for record in caplog.records if record.levelno >= logging.ERROR]
    assert all(line.startswith(start) for line in lines)
    return [line.removeprefix(start) for line in lines]


@pytest.mark.parametrize("case", RECORDS, ids=name)
def test_a_bad_row_is_refused_by_itself(
    case: Case, held: Held, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(held.store, case.path.read_text(), GOOD_ROW)
    committed = gateway.follower.step(NOW)
    assert committed is not None
    assert committed.revision == 2
    assert refusals(caplog) == [case.expected]
    assert gateway.follower.refused == 1
    assert {source: gateway.reason(*source) for source in OLD} == OLD, "the record before stays in force"
    assert gateway.reason(*NEW) is Reason.ALLOWED_OFFER, "the rest of the revision stands"
    assert gateway.follower.step(NOW) is None, "and that was that"
    gateway.writer.decide_due(now=NOW)


@pytest.mark.parametrize("case", RECORDS, ids=name)
def test_a_bad_row_is_refused_where_there_is_no_table_yet(
    case: Case, held: Held, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(held.store, case.path.read_text(), GOOD_ROW)
    gateway = Gateway(tmp_path, held)
    try:
        assert refusals(caplog, anew=True) == [case.expected]
        assert gateway.reason(*NEW) is Reason.ALLOWED_OFFER
        assert gateway.reason(1, "10.0.0.4") is Reason.ALLOWED_OFFER
    finally:
        gateway.close()


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["yaml", "json"])
@pytest.mark.parametrize("case", RECORDS, ids=name)
def test_export_reports_a_bad_row(case: Case, form: list[str], held: Held) -> None:
    """Otherwise the record would be missing if the export is applied again."""
    write_rows(held.store, case.path.read_text())
    result = portward("export", *form, "--config", str(held.config))
    assert result.code == 1
    assert one_line(result.stderr) == f"portward: {case.expected}"


@pytest.mark.parametrize("case", RECORDS, ids=name)
def test_an_inventory_puts_a_bad_row_right(case: Case, held: Held, gateway: Gateway) -> None:
    write_rows(held.store, case.path.read_text())
    gateway.follower.step(NOW)
    inventory = held.store.with_name("inventory.yaml")
    inventory.write_text(EXAMPLE)
    result = portward("apply", "--prune", str(inventory), "--config", str(held.config))
    assert (result.code, result.stderr) == (0, "")
    gateway.follower.step(NOW)
    assert {source: gateway.reason(*source) for source in OLD} == OLD
    exported = portward("export", "--config", str(held.config))
    if case.path.stem in UNNAMED:
        assert one_line(exported.stderr) == f"portward: {case.expected}"
    else:
        assert exported.code == 0
        assert result.stdout.startswith("applied revision 3: ")


@pytest.mark.parametrize("case", RECORDS, ids=name)
def test_a_dry_run_prints_the_rows_that_it_would_replace(case: Case, held: Held, tmp_path: Path) -> None:
    write_rows(held.store, case.path.read_text())
    inventory = tmp_path / "inventory.yaml"
    inventory.write_text(EXAMPLE)
    result = portward("apply", "--prune", "--dry-run", str(inventory), "--config", str(held.config))
    assert (result.code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("would change revision 2: ")
    assert all(unshown(line) is None for line in lines), result.stdout


def test_a_row_that_was_refused_and_then_removed_leaves_nothing_in_force(held: Held, gateway: Gateway) -> None:
    """The last row in the store cannot be read, and the table still holds the record before it. Removing the row
    removes that record."""
    keys = ("attachments/vni1002/10.0.0.0/24", f"exemptions/{FABRIKAM.id}", f"subscriptions/{CONTOSO.id}")
    write_rows(held.store, *(row(key, "no JSON") for key in keys))
    gateway.follower.step(NOW)
    assert {source: gateway.reason(*source) for source in OLD} == OLD
    write_rows(held.store, *(row(key, None) for key in keys))
    gateway.follower.step(NOW)
    assert gateway.reason(2, "10.0.0.9") is None
    assert gateway.reason(1, "10.0.0.4") is Reason.DENIED_UNKNOWN_SOURCE


@pytest.mark.parametrize("number", [-5, 2**63 - 1])
def test_a_revision_that_cannot_be_is_refused(number: int, held: Held) -> None:
    """The next revision would not fit into the database's number, or the table would get a negative one."""
    another = "DROP TRIGGER revision_kept; DELETE FROM revision; PRAGMA foreign_keys = OFF;"
    with closing(sqlite3.connect(held.store)) as connection:
        connection.executescript(another)
        connection.execute("INSERT INTO revision VALUES (?, '', 'another tool', X'00', X'00')", (number,))
        connection.commit()
    inventory = held.store.with_name("inventory.yaml")
    inventory.write_text("exemptions: []\n")
    for arguments in (["export"], ["apply", "--prune", str(inventory)]):
        result = portward(*arguments, "--config", str(held.config))
        assert result.code == 1
        message = f"{number} is no revision that can be; restore it from a backup"
        assert one_line(result.stderr) == f"portward: sqlite:{held.store}: {message}"


def test_a_store_whose_name_no_file_can_have_is_refused(held: Held) -> None:
    inventory = held.store.with_name("inventory.yaml")
    inventory.write_text(EXAMPLE)
    held.config.write_text(held.config.read_text().replace("portward.db", "port\\u0000ward.db"))
    result = portward("apply", str(inventory), "--config", str(held.config))
    assert result.code == 1
    assert one_line(result.stderr).endswith("port\\x00ward.db: no file has a NUL in its name")


@pytest.mark.parametrize("at", ["''", "'yesterday'", "X'00'", "5", "'2026-01-01'", "'9999-12-31T23:59:59-01:00'"])
def test_a_revision_at_no_time_is_taken(at: str, held: Held, gateway: Gateway) -> None:
    write_rows(held.store, GOOD_ROW, at=at)
    gateway.follower.step(NOW)
    assert gateway.reason(*NEW) is Reason.ALLOWED_OFFER


@pytest.mark.parametrize(
    "change", ["DELETE FROM store", "UPDATE store SET identity = 'text'", "UPDATE store SET identity = X'00'"]
)
def test_a_store_without_its_identity_is_refused(change: str, held: Held) -> None:
    write_rows(held.store, change)
    result = portward("export", "--config", str(held.config))
    assert result.code == 1
    assert one_line(result.stderr) == (
        f"portward: sqlite:{held.store}: the store has lost its identity; restore it from a backup"
    )
