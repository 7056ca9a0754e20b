"""When jobs of the event loop run: at common periodic moments, or when a descriptor becomes readable.

Periodic jobs run at the same moments. A process that wakes finds its processor caches cold, so a job then costs
several times as much as a job in a process that is awake already.
"""

from __future__ import annotations

import asyncio


def until_tick(seconds: float) -> float:
    """Seconds until the next multiple of `seconds` on the loop clock, so that periodic jobs wake together."""
    return seconds - asyncio.get_running_loop().time() % seconds


async def readable(descriptor: int | None, seconds: float) -> None:
    """Waits until a descriptor is readable, at most `seconds`. Without a descriptor it only waits.

    The descriptor is unregistered as soon as it is readable. Otherwise the loop would spin until it is drained,
    and take processor time from the threads.
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
