"""The SQL of the store: its tables, the way from format 1 to 2, and the longer queries. Pure text."""

from __future__ import annotations

from typing import Final

FORMAT: Final = 2
# The format before, whose log has no hashes.
UNSEALED: Final = 1

_REVISION: Final = """(
  number INTEGER PRIMARY KEY, at TEXT NOT NULL, actor TEXT NOT NULL, previous BLOB NOT NULL, hash BLOB NOT NULL
)"""
CREATE_ORIGIN: Final = "CREATE TABLE origin (at TEXT NOT NULL, sealed INTEGER NOT NULL, hash BLOB NOT NULL)"


def _only_grows(table: str) -> str:
    """Statements that make SQLite itself refuse to change or delete a row of the table."""
    refuse = "BEGIN SELECT RAISE(ABORT, 'the log only grows'); END"
    return f"""
CREATE TRIGGER {table}_stays BEFORE UPDATE ON {table} {refuse};
CREATE TRIGGER {table}_kept BEFORE DELETE ON {table} {refuse};
"""


SCHEMA: Final = f"""
CREATE TABLE store (identity BLOB NOT NULL);
CREATE TABLE record (key TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE revision {_REVISION};
CREATE TABLE change (
  revision INTEGER NOT NULL REFERENCES revision, key TEXT NOT NULL, before TEXT, after TEXT,
  PRIMARY KEY (revision, key)
) WITHOUT ROWID;
{CREATE_ORIGIN};
{_only_grows("revision")}
{_only_grows("change")}
{_only_grows("origin")}
PRAGMA user_version = {FORMAT};
"""

# Sealing. SQLite cannot add a NOT NULL column without a default, so a new table replaces `revision`. The triggers
# go with the old table.
CREATE_SEALED: Final = f"CREATE TABLE sealed_revision {_REVISION}"
SEAL_ONE: Final = "INSERT INTO sealed_revision SELECT number, at, actor, ?2, ?3 FROM revision WHERE number = ?1"
REPLACE_REVISION: Final = f"""
DROP TABLE revision;
ALTER TABLE sealed_revision RENAME TO revision;
{_only_grows("revision")}
{_only_grows("origin")}
PRAGMA user_version = {FORMAT};
"""

# Writes no line to the log if the record is already what it will be.
LOG_CHANGE: Final = """
INSERT INTO change SELECT ?1, ?2, body, ?3 FROM (SELECT 1) LEFT JOIN record ON key = ?2 WHERE body IS NOT ?3
"""

# In descending order, `attachments/` comes last. A key of another tool may come anywhere.
RECORDS: Final = "SELECT key, body FROM record WHERE ?1 IS NULL OR key < ?1 ORDER BY key DESC"

ENTRIES: Final = """
SELECT number, at, actor, {hashes}, (SELECT count(*) FROM change WHERE revision = number)
FROM revision WHERE ?1 IS NULL OR number > ?1 ORDER BY number
"""
ROWS: Final = """
SELECT key, before, after FROM change WHERE revision = ?1 AND (?2 IS NULL OR key > ?2) ORDER BY key
"""
# Steps from one revision to the next, because a bulk change has a million rows in one revision.
STRAYS: Final = """
WITH RECURSIVE found (number) AS (
  SELECT min(revision) FROM change
  UNION ALL
  -- NULL after the last revision: that ends the recursion.
  SELECT (SELECT min(revision) FROM change WHERE revision > number) FROM found WHERE number IS NOT NULL
)
SELECT number FROM found WHERE number IS NOT NULL AND number NOT IN (SELECT number FROM revision)
"""
