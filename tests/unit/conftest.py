"""Fixtures for all unit tests. The tests do not depend on the machine that they run on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from portward.dataplane import others, surroundings, tableowner, tunnels
from portward.store.sqlite.store import SqliteStore
from unit.store.samples import opened


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without legacy iptables and without the program nft, on which only tunnels of devices end."""
    monkeypatch.setattr(others, "_LEGACY", ())
    monkeypatch.setattr(tableowner, "_old_nft", lambda: "")
    found = SimpleNamespace(tunnel_ports=lambda devices: tunnels.Ports(tunnels.of_devices(devices)))
    monkeypatch.setattr(surroundings, "genetlink", found)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of this test's store."""
    return tmp_path / "portward.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    """An empty store."""
    store = opened(path)
    yield store
    store.close()
