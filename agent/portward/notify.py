"""Words to the service manager, by the protocol of sd_notify(3); silent where there is none. And the log as its
journal takes it, by sd-daemon(3)."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys


def notify(*words: str) -> None:
    """Sends assignments such as `READY=1` to the socket named by NOTIFY_SOCKET. Where nobody takes them (the
    manager is being restarted, its socket is full) they are lost: enforcement does not depend on them."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.setblocking(False)
        with contextlib.suppress(OSError):
            # A leading @ stands for the abstract namespace.
            out.sendto("\n".join(words).encode(), "\0" + address[1:] if address[0] == "@" else address)


class _Journal(logging.Formatter):
    """Each line begins with its priority, which the journal keeps as a field."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


def log_formatter() -> logging.Formatter:
    """How lines for stderr are to look: for the journal, where that is what reads them, else for people."""
    with contextlib.suppress(OSError):
        status = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
            return _Journal("%(message)s")
    return logging.Formatter("%(levelname)s %(message)s")


def watchdog_seconds() -> float | None:
    """How often the service manager wants to hear from us, in seconds; None: not at all."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    return int(microseconds) / 1_000_000 if microseconds else None
