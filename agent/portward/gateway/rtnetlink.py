"""Interfaces as they come, go and change their index, followed over rtnetlink.

An interface index can be used again by another tenant's interface, so a link that was deleted or renamed is
reported as touched even when everything looks as before by the time it is reported.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTMGRP_LINK

from portward.gateway.links import Links

# Between a broken conversation with the kernel and the next, in seconds.
_PAUSE: Final = 0.1

_log = logging.getLogger("portward.links")


async def follow() -> AsyncGenerator[Links, None]:
    """Yields the interfaces there are, then again after each change; the first one touches nothing.

    Where the kernel dropped messages (it does so to slow readers), everything is read anew and every index
    known before counts as touched. Raises OSError where rtnetlink cannot be used at all.
    """
    known: dict[int, str] = {}
    first = True
    while True:
        try:
            async for links in _follow_once(known, first=first):
                first, known = False, links.names
                yield links
        except (NetlinkError, OSError, ValueError) as error:
            if first:
                raise
            _log.warning("interfaces are read anew: %s", error)
        await asyncio.sleep(_PAUSE)


async def _follow_once(before: dict[int, str], *, first: bool) -> AsyncGenerator[Links, None]:
    async with AsyncIPRoute() as events:
        # Events first, then the list: what changes in between is seen in both.
        await events.bind(groups=RTMGRP_LINK)
        names = await _names()
        yield Links(dict(names), frozenset() if first else frozenset(before))
        queue: asyncio.Queue[tuple[str, int, str]] = asyncio.Queue()
        reading = asyncio.create_task(_read(events, queue))
        try:
            while True:
                yield await _next(names, queue, reading)
        finally:
            reading.cancel()


async def _names() -> dict[int, str]:
    async with AsyncIPRoute() as route:
        return {int(link["index"]): str(link.get("ifname")) async for link in await route.get_links()}


async def _read(events: AsyncIPRoute, queue: asyncio.Queue[tuple[str, int, str]]) -> None:
    while True:
        async for message in events.get():
            if message.get("event") in ("RTM_NEWLINK", "RTM_DELLINK"):
                queue.put_nowait((message["event"], int(message["index"]), str(message.get("ifname"))))


async def _next(
    names: dict[int, str], queue: asyncio.Queue[tuple[str, int, str]], reading: asyncio.Task[None]
) -> Links:
    """Waits for a change, takes all that have come by then into `names`, and says what they touched."""
    touched: set[int] = set()
    before = dict(names)
    while names == before and not touched:
        waiting = asyncio.create_task(queue.get())
        await asyncio.wait({waiting, reading}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            reading.result()  # raises what ended the reading
        event = waiting.result()
        while event is not None:
            _take(event, names, touched)
            event = queue.get_nowait() if not queue.empty() else None  # type: ignore[assignment] # the end
    return Links(dict(names), frozenset(touched))


def _take(event: tuple[str, int, str], names: dict[int, str], touched: set[int]) -> None:
    kind, index, name = event
    if kind == "RTM_DELLINK":
        if names.pop(index, None) is not None:
            touched.add(index)
    else:
        if names.get(index, name) != name:
            touched.add(index)
        names[index] = name
