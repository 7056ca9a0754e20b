"""When jobs of the event loop run: periodic ones at the same moments, so that the process wakes seldom, and others
when a descriptor can be read."""

from __future__ import annotations

import asyncio


def until_tick(seconds: float) -> float:
    """Seconds until the next multiple of `seconds` on the loop clock, so that periodic jobs wake together."""
    return seconds - asyncio.get_running_loop().time() % seconds


async def readable(descriptor: int | None, seconds: float) -> None:
    """Waits until a descriptor can be read, or for so many seconds.

    It is let go of as soon as it can: until it is drained the loop would turn around it all the time, and keep the
    threads that work waiting.
    """
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if descriptor is not None:
            loop.remove_reader(descriptor)
        if not woken.done():
            woken.set_result(None)

    if descriptor is not None:
        loop.add_reader(descriptor, wake)
    timer = loop.call_later(seconds, wake)
    try:
        await woken
    finally:
        timer.cancel()
        if descriptor is not None:
            loop.remove_reader(descriptor)
