"""Watches that the agent of an instance is still in the network namespace that has its name.

Another program may remove the namespace and make it anew, as OpenStack's l3-agent does when a router comes back. A
namespace lives on without its name as long as a process is in it, so the agent would enforce in one that no packet
crosses, and nothing would enforce in the new one.
"""

from __future__ import annotations

import asyncio
from typing import Final

from portward.base import netns
from portward.daemon.timers import until_tick
from portward.errors import PortwardError

# A look takes some microseconds. Until the agent has ended, the new namespace has at most its baseline.
_INTERVAL_S: Final = 0.5


async def watch(name: str) -> None:
    """Waits until the namespace of this process has lost its name, and raises PortwardError then, which ends the
    agent. systemd starts the next one in the namespace that has the name by then."""
    while netns.is_own(name):
        await asyncio.sleep(until_tick(_INTERVAL_S))
    raise PortwardError(
        f"network namespace {name!r} was removed or made anew: this agent ends, because it enforces in the one "
        "that had the name before"
    )
