"""How long after its commit in SQLite a change is enforced in the kernel, seen in the packets of the source
itself.

A tenant sends a segment every 0.2 ms, each with a number. After a change from allowed to denied, the last
number that arrives shows until when the kernel let packets pass. After a change back, the first number shows
since when. The clock starts when the commit returns. Sender, receiver, agent and worker share the machine's cores.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from datetime import UTC, date, datetime
from pathlib import Path
from uuid import UUID

from scapy.packet import Packet

from bench.figures import Figure, percentile
from kernel.conftest import Gateway, running_gateway
from kernel.wire import Sender, segment
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, Tenant
from portward.model import Standing, Subscription
from portward.store.backends import open_store
from portward.store.codec import encode, key_of
from portward.store.values import Put

SOURCE = "10.0.0.50"
_EVERY = 0.0002
_SETTLED = 0.02


class Stream:
    """Numbered segments from one source, and when those that arrive were sent."""

    def __init__(self, gateway: Gateway, source: str, tenant: Tenant = CONTOSO, every: float = _EVERY) -> None:
        self._every = every
        self._sender = Sender(gateway.lab, tenant)
        frame = bytearray(bytes(self._sender.frame / _numbered(source)))
        self._frame, self._place = frame, len(frame) - 16  # the sequence number within the last 20 bytes
        with namespaces.inside(gateway.lab.internet):
            self._receiver = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
        self._receiver.bind(("eth0", 0))
        self._receiver.settimeout(0.1)
        self.sent: dict[int, float] = {}
        self.arrived: list[int] = []
        self._going = True
        self._threads = [threading.Thread(target=job, daemon=True) for job in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the stream."""
        self._going = False
        for thread in self._threads:
            thread.join()
        self._sender.close()
        self._receiver.close()

    def _send(self) -> None:
        number = 0
        while self._going:
            number += 1
            struct.pack_into(">I", self._frame, self._place, number)
            self.sent[number] = time.monotonic()
            self._sender._socket.send(self._frame)
            time.sleep(self._every)  # pause: the pace of the sender

    def _receive(self) -> None:
        while self._going:
            try:
                data = self._receiver.recv(256)
            except TimeoutError:
                continue
            # Ethernet 14, IPv4 20: the port and the sequence number of the TCP header.
            if len(data) >= 54 and data[12:14] == b"\x08\x00" and data[36:38] == b"\x00\x19":
                self.arrived.append(int.from_bytes(data[38:42], "big"))


def _numbered(source: str) -> Packet:
    # The checksum may stay wrong: nothing on the way checks it, and port 25 on the other side has no listener.
    return segment(source, "A")


def measure(folder: Path, changes: int = 500) -> list[Figure]:
    """`change_to_kernel_p99_ms` over this many changes."""
    # By default, Python's threads take turns every 5 ms, and the sender would pause for as long.
    sys.setswitchinterval(0.0002)
    with running_gateway(folder) as gateway:
        id_ = gateway.source(CONTOSO, SOURCE, "enterprise-agreement")
        stream = Stream(gateway, SOURCE)
        try:
            until(lambda: len(stream.arrived) > 100, "the stream arrives")
            delays = [_change(gateway, stream, id_.hex, number) for number in range(changes)]
        finally:
            stream.close()
    milliseconds = [delay * 1000 for delay in delays]
    return [
        Figure(
            "change_to_kernel_p99_ms",
            percentile(milliseconds, 0.99),
            percentile(milliseconds, 0.5),
            max(milliseconds),
            "ms (from: median, to: largest)",
            "<= 10",
        )
    ]


def _change(gateway: Gateway, stream: Stream, id_: str, number: int) -> float:
    """Makes one change: an even `number` denies, an odd one allows. Returns its delay in seconds."""
    deny = number % 2 == 0
    record = Subscription(
        id=UUID(id_),
        offer="enterprise-agreement",
        created=date(2022, 6, 30),
        standing=Standing.DISABLED if deny else Standing.GOOD,
    )
    store = open_store(f"sqlite:{gateway.agent.folder / 'portward.db'}")
    try:
        store.write(
            [Put(key_of(record), encode(record))], expected=store.revision(), actor="bench", at=datetime.now(UTC)
        )
        committed = time.monotonic()
    finally:
        store.close()
    mark = len(stream.arrived)
    if not deny:
        until(lambda: any(stream.sent[n] > committed for n in stream.arrived[mark:]), "packets pass", seconds=2)
        time.sleep(_SETTLED)  # pause: packets that are on their way arrive
        return min(stream.sent[n] for n in stream.arrived[mark:] if stream.sent[n] > committed) - committed
    quiet = time.monotonic()
    seen = len(stream.arrived)
    while time.monotonic() - quiet < _SETTLED:
        if len(stream.arrived) != seen:
            seen, quiet = len(stream.arrived), time.monotonic()
        if time.monotonic() - committed > 2:
            raise TimeoutError("the denied source still sends after 2 s")
        time.sleep(0.001)  # pause: of a poll
    late = [stream.sent[n] for n in stream.arrived[mark:] if stream.sent[n] > committed]
    return max(late, default=committed) - committed
