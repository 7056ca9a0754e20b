"""A gateway whose table has an owner, and what the kernel says of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from kernel.conftest import Gateway, running_gateway
from portward.dataplane.names import TABLE
from portward.dataplane.nfnetlink import NfNetlink, TableState
from portward.lab import namespaces

# The folder that lets the agent own its table on a host whose nft is older than 1.1.
_OWNING: Final = Path(__file__).parent / "owning"
# The deletions and changes by which another program could open the port. `flush ruleset` is missing: the kernel
# leaves the table out, and reports no error.
COMMANDS: Final = (
    "delete table inet portward",
    "flush table inet portward",
    "flush chain inet portward screen",
    "delete chain inet portward learn",
    "insert rule inet portward screen accept",
    "flush set inet portward epoch",
    "add element inet portward epoch { 0x80 }",
    "flush set inet portward deny4",
    "add chain inet portward theirs { type filter hook prerouting priority -400; }",
    "table inet portward { flags dormant; }",
)


@contextlib.contextmanager
def owning(folder: Path, **settings: Any) -> Iterator[Gateway]:
    """A gateway whose agent owns its table, whatever the host's nft is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(_OWNING), os.environ.get("PYTHONPATH", "")))))
        with running_gateway(folder, ruleset={"owned": "auto"}, **settings) as found:
            yield found


def look(gateway: Gateway) -> NfNetlink:
    """A socket beside the agent's."""
    with namespaces.inside(gateway.lab.gateway):
        return NfNetlink()


def state(gateway: Gateway, table: str = TABLE) -> TableState | None:
    """The table in the kernel."""
    with closing(look(gateway)) as netlink:
        return netlink.state(table)


def owner(gateway: Gateway) -> int:
    """The socket that owns the table; 0 if none does."""
    found = state(gateway)
    return 0 if found is None else found.owner


def custodians(gateway: Gateway) -> list[int]:
    """The custodians in the gateway's namespace."""
    found = []
    for pid in namespaces.run(gateway.lab.gateway, ["ip", "netns", "pids", gateway.lab.gateway]).stdout.split():
        with contextlib.suppress(OSError):  # it has ended since
            if b"portward.custodian.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def nft(gateway: Gateway, text: str) -> str:
    """Runs the program nft, and gives what it says on stderr."""
    return namespaces.run(gateway.lab.gateway, ["nft", "-f", "-"], text=text).stderr
