"""What holds for all unit tests: the machine that they run on is none of their matter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from portward.gateway import around, others, tunnels


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Legacy iptables is not in use here, and no tunnel but those of devices ends here."""
    monkeypatch.setattr(others, "_LEGACY", ())
    found = SimpleNamespace(
        of_devices=tunnels.of_devices, find=lambda devices: tunnels.Ports(tunnels.of_devices(devices))
    )
    monkeypatch.setattr(around, "tunnels", found)
