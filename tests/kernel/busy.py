"""A policy table that is busy, as it is while a bulk change of some seconds is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from portward.table.database import open_database


@contextmanager
def busy_table(folder: Path) -> Iterator[None]:
    """Holds the write lock of the table in `folder`: whoever wants to change it waits."""
    environment = open_database(folder, write=True)
    try:
        with environment.begin(write=True):
            yield
    finally:
        environment.close()
