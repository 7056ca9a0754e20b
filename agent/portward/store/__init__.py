"""The stores of policy; `open_store` picks the backend by the URL of the configuration."""

from __future__ import annotations

from pathlib import Path

from portward.config.keys import STORE
from portward.errors import InputError
from portward.store.protocol import Store
from portward.store.sqlite import SqliteStore


def open_store(url: str, *, create: bool = False, agent: bool = False) -> Store:
    """The store at `sqlite:PATH`, made where it is missing if `create`. An `agent` does not wait for long if
    another process holds the store locked. Raises InputError for another kind of URL, NoStoreError where it is
    missing, StoreError where it cannot be opened."""
    found = STORE.fullmatch(url)
    if found is None:
        raise InputError(f"{url!r} is no store that this version knows: sqlite:PATH", field="store")
    return SqliteStore(Path(found[1]), create=create, agent=agent)
