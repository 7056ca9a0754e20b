"""An agent in a network namespace with a name, started and restarted by the units of the package."""

from __future__ import annotations

import json
import time
from pathlib import Path

from vm.guest.machine import row, sh, slower, until
from vm.guest.reporting import report

NAME = "east"
_UNIT = f"portward@{NAME}"
_FILE = Path("/etc/portward") / f"{NAME}.toml"
# Seconds until a namespace that was made anew is closed. Without emulation of the processor it takes a tenth.
_CLOSED_S = 5.0


def begin() -> None:
    """The unit waits for its namespace, closes it, and starts an agent there; then again in another one of that
    name."""
    report(stage="an agent in a network namespace")
    _FILE.write_text(
        'segments = ["seg*"]\nuplinks = ["upx"]\n'
        f'store = "sqlite:/var/lib/portward/{NAME}.db"\ntable = "/var/cache/portward-instances/{NAME}"\n'
    )
    sh(f"systemctl enable --now {_UNIT}")
    states = sh(f"systemctl is-active {_UNIT}.path {_UNIT}.service", check=False).split()
    row("without the namespace, its path unit waits", states, good=states == ["active", "inactive"])
    appears()
    for number in range(1, 4):
        _made_anew(number)
    before = _pid()
    sh(f"ip netns del {NAME}")
    took = until(lambda: _state() == "inactive", "the agent has ended", seconds=60)
    row("without the namespace the agent ends, and is no failure", f"{took:.1f} s", good=_pid() == "0" != before)
    appears()


def appears() -> None:
    """Makes the namespace, and waits until the agent enforces in it."""
    _make()
    closed = until(_is_closed, "the namespace is closed", seconds=60)
    until(lambda: _state() == "active", f"{_UNIT} is active", seconds=120)
    row("a namespace that appears is closed, then enforced", f"closed after {closed:.1f} s", good=_enforces())


def _made_anew(number: int) -> None:
    before, began = _pid(), time.monotonic()
    sh(f"ip netns del {NAME}")
    _make()
    until(_is_closed, "the new namespace is closed", seconds=60)
    closed = time.monotonic() - began
    until(lambda: _state() == "active" and _pid() not in ("0", before), "another agent", seconds=120)
    found = f"closed after {closed:.1f} s, enforced after {time.monotonic() - began:.1f} s"
    row(
        f"a namespace that is made anew, {number}",
        found,
        good=_enforces() and closed <= _CLOSED_S * slower(),
    )


def upgraded(wanted: str) -> None:
    """Checks that the agent of the instance is of the package's version now."""
    until(lambda: _status().get("version") == wanted, f"version {wanted} of {_UNIT}", seconds=120)
    row("the instance was restarted, too", wanted, good=_enforces())


def waits() -> None:
    """Checks that the unit waits for its namespace after a boot."""
    states = sh(f"systemctl is-active {_UNIT}.path {_UNIT}.service", check=False).split()
    row(f"{_UNIT} waits for its namespace after the boot", states, good=states == ["active", "inactive"])


def _make() -> None:
    sh(f"ip netns add {NAME}; ip -n {NAME} link set lo up")


def _is_closed() -> bool:
    return "inet portward" in sh(f"ip netns exec {NAME} nft list tables")


def _enforces() -> bool:
    """Whether the agent's own status says that its worker answers, and its process is in the namespace."""
    until(lambda: bool(_status()), f"a status of {_UNIT}", seconds=60)
    return str(_status()["pid"]) == _pid() and _pid() in sh(f"ip netns pids {NAME}").split()


def _status() -> dict[str, object]:
    said = sh(f"portward status --json --instance {NAME} 2>/dev/null", check=False)
    found: dict[str, object] = json.loads(said) if said.startswith("{") else {}
    return found


def _state() -> str:
    return sh(f"systemctl is-active {_UNIT}", check=False)


def _pid() -> str:
    return sh(f"systemctl show -P MainPID {_UNIT}")
