"""What a child process prints, line by line: whatever it is, it neither ends the reader nor fills log or memory.

A library that a worker loads may print at any time: half a line, a very long one, bytes that are no text. All
of it is read, because a process whose pipe is full stands still.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from portward.errors import printable

# No line of ours is longer, in bytes; of a longer one the beginning is kept.
LONGEST: Final = 4_096
_CHUNK: Final = 65_536
# Lines of one child that are logged within this many seconds; the others are counted.
_LOGGED: Final = 20
_WINDOW_S: Final = 60.0


async def lines_of(stream: asyncio.StreamReader, longest: int = LONGEST) -> AsyncIterator[bytes]:
    """The lines of a stream, without their ends, until it ends; of each at most the first `longest` bytes. What
    stands behind the last line end counts as a line, too."""
    line = b""
    while data := await stream.read(_CHUNK):
        first, *others = data.split(b"\n")
        line += first[: longest - len(line)]
        for following in others:
            yield line
            line = following[:longest]
    if line:
        yield line


class LogLimiter:
    """Logs lines that others wrote, a bounded number of them in a minute, and says how many it left out."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._until = float("-inf")
        self._logged = self._left_out = 0

    def line(self, level: int, prefix: str, line: bytes) -> str:
        """Logs a line unless too many were logged lately. Gives it as printable text."""
        text = printable(line.decode(errors="backslashreplace").rstrip())
        now = self._clock()
        if now >= self._until:
            self._until, self._logged = now + _WINDOW_S, 0
            if self._left_out:
                self._log.log(level, "%s%d more lines, which are not shown", prefix, self._left_out)
                self._left_out = 0
        if self._logged < _LOGGED:
            self._logged += 1
            self._log.log(level, "%s%s", prefix, text)
        else:
            self._left_out += 1
        return text
