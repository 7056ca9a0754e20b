"""Reads what a child process prints, line by line, and limits how much of it is logged.

A library that a worker loads may print at any time: half a line, a very long line, or bytes that are not text. All
of it is read, because a process blocks if its pipe is full. None of it ends the reader or fills the memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from portward.errors import printable

# portward's own messages are shorter. Of a longer line only the beginning is kept.
MAX_LINE_BYTES: Final = 4_096
# A pipe holds this much by default (pipe(7)).
_CHUNK_BYTES: Final = 65_536
# At most 20 lines of one child are logged in a minute, so that the log keeps room; the others are counted.
_MAX_LOGGED_LINES: Final = 20
_WINDOW_S: Final = 60.0


async def lines_of(stream: asyncio.StreamReader, longest: int = MAX_LINE_BYTES) -> AsyncIterator[bytes]:
    """The lines of a stream without their line ends, until the stream ends. Each line is cut to `longest` bytes.
    Text behind the last line end is a line, too."""
    line = b""
    while data := await stream.read(_CHUNK_BYTES):
        first, *others = data.split(b"\n")
        line += first[: longest - len(line)]
        for following in others:
            yield line
            line = following[:longest]
    if line:
        yield line


class LogLimiter:
    """Logs lines of another program, at most `_MAX_LOGGED_LINES` a minute, and then how many it left out."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._until = float("-inf")
        self._logged = self._left_out = 0

    def line(self, level: int, prefix: str, line: bytes) -> str:
        """Logs a line unless too many were logged in this minute. Returns it as printable text."""
        text = printable(line.decode(errors="backslashreplace").rstrip())
        now = self._clock()
        if now >= self._until:
            self._until, self._logged = now + _WINDOW_S, 0
            if self._left_out:
                self._log.log(level, "%s%d more lines, which are not shown", prefix, self._left_out)
                self._left_out = 0
        if self._logged < _MAX_LOGGED_LINES:
            self._logged += 1
            self._log.log(level, "%s%s", prefix, text)
        else:
            self._left_out += 1
        return text
