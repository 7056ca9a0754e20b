"""Samples of the data that each version of portward wrote, as text. All later versions must read them correctly.

A file here is never changed. A new format gets a file of its own, made once from the output of the new version.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent


def golden(name: str) -> Any:
    """The JSON value in the file of that name."""
    return json.loads((FOLDER / name).read_text())


def store(version: int, path: Path) -> None:
    """Makes the SQLite store of a format from its script."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript((FOLDER / f"store-{version}.sql").read_text())
