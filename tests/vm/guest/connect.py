"""An allowed tenant that opens connections to port 25, each from an address without a cached verdict.

    python3 -m vm.guest.connect SEGMENT

It writes a JSON line to /run/vm/connect-SEGMENT when it begins a connection, and another one with the seconds of
waiting when the connection is open.
"""

from __future__ import annotations

import itertools
import json
import selectors
import signal
import socket
import struct
import sys
import time
from ipaddress import ip_network
from typing import TextIO

from vm.guest.world import MAIL4, RUN, SEGMENTS, SMTP_PORT

EVERY = 0.2  # seconds
_PATIENCE = 15.0


def main() -> None:
    """Connects until it is ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    segment = sys.argv[1]
    prefix = ip_network(SEGMENTS[segment][4])
    waiting: dict[socket.socket, float] = {}
    chooser = selectors.DefaultSelector()
    due = time.monotonic()
    with (RUN / f"connect-{segment}").open("a", buffering=1) as out:
        for number in itertools.count(16):
            _begin(str(prefix[number % 4000]), waiting, chooser, out)
            due = max(due + EVERY, time.monotonic())
            while (left := due - time.monotonic()) > 0:
                for key, _ in chooser.select(left):
                    assert isinstance(key.fileobj, socket.socket)
                    opened = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                    _end(key.fileobj, waiting, chooser, out, opened=opened)
            for one in [one for one, at in waiting.items() if at < due - _PATIENCE]:
                _end(one, waiting, chooser, out, opened=False)


def read(began: float, end: float) -> list[float | None]:
    """For each connection that was begun between two moments (monotonic), the seconds until it was open. None
    stands for a connection that did not open, or has not yet."""
    found: dict[float, float | None] = {}
    for path in RUN.glob("connect-*"):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            found[one["at"]] = one.get("wait")
    return [wait for at, wait in found.items() if began <= at <= end]


def _begin(source: str, waiting: dict[socket.socket, float], chooser: selectors.BaseSelector, out: TextIO) -> None:
    one = socket.socket()
    one.setblocking(False)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.bind((source, 0))
    waiting[one] = time.monotonic()
    out.write(json.dumps({"at": waiting[one]}) + "\n")
    one.connect_ex((MAIL4, SMTP_PORT))
    chooser.register(one, selectors.EVENT_WRITE)


def _end(
    one: socket.socket,
    waiting: dict[socket.socket, float],
    chooser: selectors.BaseSelector,
    out: TextIO,
    *,
    opened: bool,
) -> None:
    at = waiting.pop(one)
    chooser.unregister(one)
    one.close()
    if opened:
        out.write(json.dumps({"at": at, "wait": time.monotonic() - at}) + "\n")


if __name__ == "__main__":
    main()
