"""The stores of policy; `open_store` picks the backend by the URL of the configuration."""

from __future__ import annotations

from pathlib import Path

from portward.errors import InputError
from portward.store.protocol import Store
from portward.store.sqlite import SqliteStore


def open_store(url: str, *, create: bool = False) -> Store:
    """The store at `sqlite:PATH`, made where it is missing if `create`. Raises InputError for another kind of
    URL, NoStoreError where it is missing, StoreError where it cannot be opened."""
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite" and rest:
        return SqliteStore(Path(rest), create=create)
    raise InputError(f"{url!r} is no store that this version knows: sqlite:PATH", field="store")
