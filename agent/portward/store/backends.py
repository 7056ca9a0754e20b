"""The stores that there are: picks one by the URL in the configuration."""

from __future__ import annotations

from pathlib import Path

from portward.config import store_url
from portward.errors import InputError
from portward.store.protocol import Store
from portward.store.sqlite.store import SqliteStore


def open_store(url: str, *, create: bool = False, agent: bool = False) -> Store:
    """Opens the store at `url` (`sqlite:PATH`), and makes it if it is missing and `create`. An `agent` does not
    wait for long if another process has the store locked. Raises InputError for another kind of URL, NoStoreError
    if the store is missing and not made, StoreError if it cannot be opened."""
    path = store_url.path_of(url)
    if path is None:
        raise InputError(store_url.unknown(url), field="store")
    return SqliteStore(Path(path), create=create, agent=agent)
