"""Words to the service manager, by the protocol of sd_notify(3); silent where there is none. And the log as its
journal takes it, by sd-daemon(3)."""

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

# A number of 64 bits has up to 20 digits; a watchdog of 30,000 years is none.
_MICROSECONDS: Final = re.compile(r"[0-9]{1,18}")


def notify(*words: str) -> None:
    """Sends assignments such as `READY=1` to the socket named by NOTIFY_SOCKET. Where nobody takes them (the
    manager is being restarted, its socket is full) they are lost: enforcement does not depend on them."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError):
        # A leading @ stands for the abstract namespace.
        _socket().sendto(
            "\n".join(words).encode("utf-8", "backslashreplace"),
            "\0" + address[1:] if address[0] == "@" else address,
        )


@functools.cache
def _socket() -> socket.socket:
    """The socket of this process, kept from the first word on: without a descriptor for a new one the watchdog
    would end an agent that enforces."""
    out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    out.setblocking(False)
    return out


class _Lines(logging.Formatter):
    """A line for each message, however many lines a text of others in it has; below it those of a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 # logging's name
        record.message = shown(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(shown(line) for line in super().format(record).split("\n"))


class _Journal(_Lines):
    """Each line begins with its priority, which the journal keeps as a field."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


def log_formatter() -> logging.Formatter:
    """How lines for stderr are to look: for the journal, where that is what reads them, else for people."""
    with contextlib.suppress(OSError):
        status = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
            return _Journal("%(message)s")
    return _Lines("%(levelname)s %(message)s")


def watchdog_seconds() -> float | None:
    """How often the service manager wants to hear from us, in seconds; None: not at all, or what it says is no
    number of microseconds, as sd_watchdog_enabled(3) has it."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not _MICROSECONDS.fullmatch(microseconds) or not int(microseconds):
        return None
    return int(microseconds) / 1_000_000
