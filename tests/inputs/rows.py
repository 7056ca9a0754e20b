"""Rows that another tool writes into the store's database, without portward's checks.

A case is SQL that fills the table `bad` (key, body). Its rows become one revision, logged as by portward.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from portward.store.notifier import notify_followers

_AS_A_REVISION = """
INSERT INTO main.revision SELECT max(number) + 1, {at}, 'another tool', zeroblob(32), zeroblob(32)
  FROM main.revision;
INSERT INTO main.change
  SELECT (SELECT max(number) FROM main.revision), key,
    (SELECT body FROM main.record WHERE record.key = bad.key), body
  FROM bad;
INSERT OR REPLACE INTO main.record SELECT key, body FROM bad WHERE body IS NOT NULL;
DELETE FROM main.record WHERE key IN (SELECT key FROM bad WHERE body IS NULL);
"""


def row(key: str, body: str | None) -> str:
    """SQL that fills `bad` with one row. A `body` of None removes the record."""
    message = "NULL" if body is None else f"'{body}'"
    return f"INSERT INTO bad VALUES ('{key}', {message});"  # noqa: S608 # by our own tests


def write_rows(store: Path, *statements: str, at: str = "'2026-06-02T00:00:00+00:00'") -> None:
    """Writes the rows of all these statements to the store as one revision, and notifies its followers. `at` is
    the revision's time, in SQL."""
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("CREATE TEMP TABLE bad (key TEXT, body TEXT)")
        for statement in statements:
            connection.executescript(statement)
        connection.executescript(f"BEGIN; {_AS_A_REVISION.format(at=at)} COMMIT;")
    notify_followers(store.with_name(store.name + ".bell"))
