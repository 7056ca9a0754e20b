"""What each version of portward wrote, as text: it is read as it was meant, for ever.

A file here is never changed. A new format gets a file of its own, made once from what the new version writes.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent


def golden(name: str) -> Any:
    """What the file of that name holds, from JSON."""
    return json.loads((FOLDER / name).read_text())


def store(version: int, path: Path) -> None:
    """Makes the SQLite store of a format from its script."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript((FOLDER / f"store-{version}.sql").read_text())
