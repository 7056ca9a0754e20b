"""What holds for all unit tests: the machine that they run on is none of their matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from portward.dataplane import others, surroundings, tunnels
from portward.store.sqlite.store import SqliteStore
from unit.store.samples import opened


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Legacy iptables is not in use here, and no tunnel but those of devices ends here."""
    monkeypatch.setattr(others, "_LEGACY", ())
    found = SimpleNamespace(tunnel_ports=lambda devices: tunnels.Ports(tunnels.of_devices(devices)))
    monkeypatch.setattr(surroundings, "genetlink", found)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store of this test is."""
    return tmp_path / "portward.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    """An empty store."""
    store = opened(path)
    yield store
    store.close()
