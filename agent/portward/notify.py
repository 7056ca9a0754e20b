"""Words to the service manager, by the protocol of sd_notify(3); silent where there is none."""

from __future__ import annotations

import contextlib
import os
import socket


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


def watchdog_seconds() -> float | None:
    """How often the service manager wants to hear from us, in seconds; None: not at all."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    return int(microseconds) / 1_000_000 if microseconds else None
