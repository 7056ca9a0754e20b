"""A locked policy table, as while the agent writes a bulk change of some seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from portward.table.database import open_database


@contextmanager
def busy_table(folder: Path) -> Iterator[None]:
    """Holds the write lock of the table in `folder`, so that every other writer waits."""
    environment = open_database(folder, write=True)
    try:
        with environment.begin(write=True):
            yield
    finally:
        environment.close()
