"""The moments at which periodic jobs run: the same ones for all, so that the process wakes seldom."""

from __future__ import annotations

import asyncio


def until_tick(seconds: float) -> float:
    """Seconds until the next multiple of `seconds` on the loop clock, so that periodic jobs wake together."""
    return seconds - asyncio.get_running_loop().time() % seconds
