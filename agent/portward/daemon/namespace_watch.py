"""Watches that the agent of an instance is still in the network namespace that has its name.

Another program may remove the namespace and make it anew, as OpenStack's l3-agent does when a router comes back. A
namespace lives on without its name as long as a process is in it, so the agent would enforce in one that no packet
crosses, and nothing would enforce in the new one.

A name is a mount on a file (`base/netns.py`), so each change of a name is a change of the mounts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Final

from portward.base import netns
from portward.base.mounts import MountChanges
from portward.daemon.timers import until_tick
from portward.errors import PortwardError

# How often the name is looked at if the kernel reports no change of the mounts. A look takes some microseconds.
_INTERVAL_S: Final = 0.5

_log = logging.getLogger("portward")


async def watch(name: str | None) -> None:
    """Waits until the namespace of this process has lost the name `name`, and raises PortwardError then, which
    ends the agent. systemd starts the next one in the namespace that has the name by then. Without a name it waits
    for ever."""
    changed = asyncio.Event()
    if name is None:
        await changed.wait()
        return
    with _set_by_mounts(changed):
        while netns.is_own(name):
            await _wait(changed)
            # Cleared before the next look, so that no change is missed.
            changed.clear()
    raise PortwardError(
        f"network namespace {name!r} was removed or made anew: this agent ends, because it enforces in the one "
        "that had the name before"
    )


async def _wait(changed: asyncio.Event) -> None:
    """Waits for the event, at most `_INTERVAL_S`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(until_tick(_INTERVAL_S)):
            await changed.wait()


@contextlib.contextmanager
def _set_by_mounts(changed: asyncio.Event) -> Iterator[None]:
    """Within the context, each change of the mounts sets the event. If that cannot be had, a warning is logged."""
    with contextlib.ExitStack() as stack:
        try:
            mounts = stack.enter_context(contextlib.closing(MountChanges()))
        except OSError as error:
            _log.warning("changes of mounts cannot be watched (%s): they are seen within %g s", error, _INTERVAL_S)
        else:
            _read(mounts, changed, stack)
        yield


def _read(mounts: MountChanges, changed: asyncio.Event, stack: contextlib.ExitStack) -> None:
    """Lets the loop set the event whenever `mounts` is readable, until the stack is closed."""
    loop = asyncio.get_running_loop()

    def wake() -> None:
        mounts.drain()
        changed.set()

    loop.add_reader(mounts.fileno(), wake)
    stack.callback(loop.remove_reader, mounts.fileno())
