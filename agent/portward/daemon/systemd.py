"""Messages to systemd: notifications by sd_notify(3), and log lines with priorities by
sd-daemon(3)."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import socket
import sys
from typing import Final

from portward.base.characters import shown

# 18 digits of microseconds are 30,000 years. More digits would not fit into 64 bits.
_MICROSECONDS: Final = re.compile(r"[0-9]{1,18}")


def notify(*words: str) -> None:
    """Sends assignments such as `READY=1` to the socket that NOTIFY_SOCKET names; without it, does nothing.

    If systemd cannot take them (it restarts, or its socket is full), they are lost. Enforcement does not need
    them.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError):
        # A leading @ means the abstract socket namespace.
        _socket().sendto(
            "\n".join(words).encode("utf-8", "backslashreplace"),
            "\0" + address[1:] if address[0] == "@" else address,
        )


@functools.cache
def _socket() -> socket.socket:
    """The socket of this process, kept open from the first use. If the process ran out of descriptors and could
    not open a new one, the watchdog would end an agent that enforces."""
    out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    out.setblocking(False)
    return out


class _Lines(logging.Formatter):
    """One line for each message, even if a foreign text in it has several; the lines of a traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 # logging's name
        record.message = shown(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(shown(line) for line in super().format(record).split("\n"))


class _Journal(_Lines):
    """Begins each line with its priority, which the journal stores as a field."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


# Python's level → syslog's priority.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


def log_formatter() -> logging.Formatter:
    """The format of log lines on stderr: for the journal if the journal reads stderr, otherwise for people."""
    with contextlib.suppress(OSError):
        status = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
            return _Journal("%(message)s")
    return _Lines("%(levelname)s %(message)s")


def watchdog_seconds() -> float | None:
    """The interval in seconds at which systemd expects a sign of life. None if it expects none, or if
    WATCHDOG_USEC is not a number of microseconds (sd_watchdog_enabled(3))."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not _MICROSECONDS.fullmatch(microseconds) or not int(microseconds):
        return None
    return int(microseconds) / 1_000_000
