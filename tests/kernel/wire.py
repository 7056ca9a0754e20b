"""Packets on the links of a lab, sent and seen by packet sockets in its namespaces."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scapy.layers.inet import IP, TCP, fragment
from scapy.layers.inet6 import IPv6, fragment6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from portward.lab import namespaces
from portward.lab.topology import MAIL4, MAIL6, Lab, Tenant

_ALL = 0x0003  # ETH_P_ALL
_SEQUENCES = itertools.count(0x10000000, 0x1000)


def link_address(namespace: str, interface: str) -> str:
    """The Ethernet address of an interface in a namespace."""
    return namespaces.run(namespace, ["cat", f"/sys/class/net/{interface}/address"]).stdout.strip()


class Sender:
    """Sends frames from a tenant's machine to the gateway, with any source."""

    def __init__(self, lab: Lab, tenant: Tenant) -> None:
        self.frame = Ether(src=link_address(lab.home(tenant), "eth0"), dst=link_address(*lab.hop(tenant)))
        with namespaces.inside(lab.home(tenant)):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.bind(("eth0", 0))

    def send(self, packet: Packet) -> None:
        """Sends a packet, from its IP header on."""
        self.send_frame(self.frame / packet)

    def send_frame(self, frame: Packet) -> None:
        """Sends a frame as it is."""
        self._socket.send(bytes(frame))

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


class Seen:
    """The frames that arrive on an interface of a namespace."""

    def __init__(self, namespace: str, interface: str = "eth0") -> None:
        with namespaces.inside(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self._socket.bind((interface, 0))
        self._socket.settimeout(0.02)

    def packets(self) -> Iterator[Packet]:
        """The frames that have arrived since the last call, until none comes for 20 ms. Frames that the interface
        sent are left out."""
        while True:
            try:
                data, address = self._socket.recvfrom(65_535)
            except TimeoutError:
                return
            if address[2] != socket.PACKET_OUTGOING:
                yield Ether(data)

    def first(self, wanted: Callable[[Packet], bool], seconds: float = 30.0) -> Packet | None:
        """The first packet for which `wanted` holds; None if none comes within `seconds`. The default is for a
        packet that must come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for packet in self.packets():
                if wanted(packet):
                    return packet
        return None

    def late(self, wanted: Callable[[Packet], bool], gateway: str, *, patience_s: float = 20.0) -> Packet | None:
        """Like `first`, for a packet that may still wait for a worker of this gateway. It waits until the queues
        are empty, at most `patience_s` seconds, so that a slow machine is not taken for a denial."""
        deadline = time.monotonic() + patience_s
        while waiting(gateway) and time.monotonic() < deadline:
            time.sleep(0.002)  # pause: of a poll
        return self.first(wanted, seconds=0.3)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


def waiting(namespace: str) -> int:
    """How many packets wait for a worker's verdict in a namespace, all queues together."""
    with namespaces.inside(namespace):
        rows = Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text().splitlines()
    return sum(int(row.split()[2]) for row in rows)


@contextmanager
def seen(namespace: str, interface: str = "eth0") -> Iterator[Seen]:
    """A `Seen` that is closed at the end."""
    view = Seen(namespace, interface)
    try:
        yield view
    finally:
        view.close()


@contextmanager
def listening(lab: Lab, greeting: bytes = b"") -> Iterator[None]:
    """A server on port 25 of the Internet side, IPv4 and IPv6. It greets each client and closes the connection."""
    with namespaces.inside(lab.internet):
        listener = socket.create_server(
            ("::", 25), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024, reuse_port=True
        )

    def serve() -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                with client, suppress(OSError):
                    client.send(greeting)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Calls `work` again and again on a thread of its own, within the `with`."""
    done = threading.Event()

    def go_on() -> None:
        while not done.is_set():
            work()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def segment(source: str, flags: str = "S", *, port: int = 25, to: str | None = None, sport: int = 4000) -> Packet:
    """A TCP segment with a unique sequence number. Address translation does not change that number, so `same` can
    recognise the segment."""
    tcp = TCP(sport=sport, dport=port, flags=flags, seq=next(_SEQUENCES))
    if ":" in source:
        return IPv6(src=source, dst=to or MAIL6) / tcp
    return IP(src=source, dst=to or MAIL4) / tcp


def in_fragments(packet: Packet, length: int) -> list[Packet]:
    """The fragments of a packet. `length` is the most bytes of each fragment; for IPv4, of its payload."""
    parts: list[Packet] = fragment6(packet, length) if IPv6 in packet else fragment(packet, length)  # type: ignore[no-untyped-call]
    return parts


def same(packet: Packet) -> Callable[[Packet], bool]:
    """A function that says whether another packet is this one, by its sequence number."""
    return lambda other: TCP in other and other[TCP].seq == packet[TCP].seq
