"""Traffic of the tenants while a fault happens, and how much of it came out.

A blocked tenant sends packets to port 25 without a pause. An allowed tenant opens connection after connection to a
listener on port 25. Both use one source with a cached verdict, and new sources all the time. A packet socket on
the Internet side counts the packets that came out. The kernel's statistics of that socket say whether it lost any.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kernel.wire import link_address
from portward.lab import namespaces
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Lab

# Prefixes behind the tenants' machines. The prefixes of unknown sources have no attachment.
ALLOWED4, ALLOWED6 = ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("2001:db8:1001:1::/64")
BLOCKED4, BLOCKED6 = ipaddress.ip_network("10.2.0.0/16"), ipaddress.ip_network("2001:db8:1002:2::/64")
UNKNOWN4, UNKNOWN6 = ipaddress.ip_network("10.3.0.0/16"), ipaddress.ip_network("2001:db8:1002:3::/64")
# Sources in the allowed tenant's segment whose policy the harness changes (`Ground.change`).
SUBJECTS4, SUBJECTS6 = ipaddress.ip_network("10.4.0.0/16"), ipaddress.ip_network("2001:db8:1001:4::/64")

SMTP_PORT, OTHER_PORT = 25, 587
_ALL: Final = 0x0003  # ETH_P_ALL
_SOL_PACKET, _PACKET_STATISTICS = 263, 6  # linux/if_packet.h
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
# A connection that is not open after this many seconds counts as failed. The limit is below the second after which
# the kernel repeats a SYN.
PATIENCE: Final = 0.5
_CONNECT_EVERY: Final = 0.02
SEND_EVERY, SEND_AT_ONCE = 0.01, 3  # seconds between bursts, packets to port 25 in each
_sequences = itertools.count(0x20000000, 0x100)


class Probe(NamedTuple):
    """A packet with a unique sequence number."""

    sequence: int
    frame: bytes


class Frames:
    """Ethernet frames from a tenant's machine to the gateway."""

    def __init__(self, lab: Lab, tenant: object = FABRIKAM) -> None:
        assert tenant in (CONTOSO, FABRIKAM)
        found = CONTOSO if tenant is CONTOSO else FABRIKAM
        self._tenant = found
        self._lab = lab
        self.renew()
        with namespaces.inside(lab.home(found)):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.bind(("eth0", 0))

    def renew(self) -> None:
        """Reads the link addresses again, because an interface that was made anew has another address."""
        to, own = (
            link_address(self._lab.gateway, self._tenant.segment),
            link_address(self._lab.home(self._tenant), "eth0"),
        )
        self._link = bytes.fromhex((to + own).replace(":", "").replace("\n", ""))

    def syn(self, source: bytes, port: int = SMTP_PORT) -> Probe:
        """A SYN from an address (4 or 16 bytes) to the mail server's port."""
        sequence = next(_sequences) & 0xFFFFFFFF
        tcp = struct.pack(">HHIIHHHH", 4000, port, sequence, 0, 0x5002, 8192, 0, 0)
        if len(source) == 4:
            to = socket.inet_aton(MAIL4)
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, 6, 0) + source + to
            ip = ip[:10] + struct.pack(">H", _checksum(ip)) + ip[12:]
            ethertype, pseudo = 0x0800, source + to + struct.pack(">HH", 6, 20)
        else:
            to = socket.inet_pton(socket.AF_INET6, MAIL6)
            ip = struct.pack(">IHBB", 6 << 28, 20, 6, 64) + source + to
            ethertype, pseudo = 0x86DD, source + to + struct.pack(">II", 20, 6)
        tcp = tcp[:16] + struct.pack(">H", _checksum(pseudo + tcp)) + tcp[18:]
        return Probe(sequence, self._link + struct.pack(">H", ethertype) + ip + tcp)

    def send(self, frame: bytes) -> None:
        """Sends a frame. If the interface is down the frame is lost, without an error."""
        with contextlib.suppress(OSError):
            self._socket.send(frame)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Attempt(NamedTuple):
    """One attempt to open a connection: when it began (monotonic), whether its source is a new one (`fresh`) or
    the usual one, whether it was over IPv6 (`sixth`), and whether the connection was opened."""

    at: float
    fresh: bool
    sixth: bool
    opened: bool


@dataclass
class Figures:
    """The traffic of a period of `seconds`. `leaked`: times (monotonic) of the blocked tenant's packets to port 25
    that came out; `sent`: how many it sent; `others`: its packets to another port that came out; `opened`:
    connections of the allowed tenant; `without`, `without_known`: seconds in which it could open no connection
    from a new source, and from its usual one; `missed`: packets that the watcher lost."""

    seconds: float = 0.0
    leaked: list[float] = field(default_factory=list)
    sent: int = 0
    others: int = 0
    opened: int = 0
    without: float = 0.0
    without_known: float = 0.0
    missed: int = 0

    @property
    def leak_seconds(self) -> float:
        """The seconds from the first leaked packet to the last."""
        return self.leaked[-1] - self.leaked[0] if self.leaked else 0.0


class Traffic:
    """Sender, connector, listener and watcher, each on a thread of its own, while the `with` lasts."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.sent = self.others = self.missed = 0
        self.leaked: list[float] = []
        self.attempts: list[Attempt] = []
        self.seen: set[int] = set()  # sequence numbers of packets to port 25 that came out
        self._going = True
        self._oldest = 0.0  # when the oldest attempt without an answer began
        self._threads: list[threading.Thread] = []
        self.failure: BaseException | None = None
        self.subjects: list[bytes] = []  # sources of the allowed tenant's segment that send all the while

    def __enter__(self) -> Traffic:
        self.frames, self.allowed_frames = Frames(self._lab, FABRIKAM), Frames(self._lab, CONTOSO)
        with namespaces.inside(self._lab.internet):
            self._view = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
            self._listener = socket.create_server(
                ("::", SMTP_PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        self._view.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 26)
        self._view.bind(("eth0", 0))
        self._view.settimeout(0.05)
        self._listener.settimeout(0.05)
        for work in (self._watch, self._listen, self._send, self._connect):
            thread = threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.join()
        for open_ in (self._view, self._listener, self.frames, self.allowed_frames):
            open_.close()

    @contextlib.contextmanager
    def measured(self) -> Iterator[Figures]:
        """Figures of the traffic within the `with`. They are filled in at its end. Raises the error of a thread
        that failed."""
        figures = Figures()
        start, sent, others, leaked = time.monotonic(), self.sent, self.others, len(self.leaked)
        try:
            yield figures
        finally:
            end = time.monotonic()
            # Wait until all attempts that were begun before the end have been answered or given up.
            while self._oldest <= end and self.failure is None:
                time.sleep(0.01)  # pause: of a poll
            time.sleep(0.1)  # pause: the watcher sees the last packets
            if self.failure is not None:
                raise self.failure
            tries = [attempt for attempt in self.attempts if start <= attempt.at <= end]
            figures.seconds = end - start
            figures.sent, figures.others = self.sent - sent, self.others - others
            figures.leaked = self.leaked[leaked:]
            figures.opened = sum(attempt.opened for attempt in tries)
            figures.without = _without([attempt for attempt in tries if attempt.fresh])
            figures.without_known = _without([attempt for attempt in tries if not attempt.fresh])
            figures.missed = self.missed

    def renew(self) -> None:
        """Reads the link addresses again after interfaces were made anew."""
        self.frames.renew()
        self.allowed_frames.renew()

    def opens(self, since: float) -> bool:
        """Whether connections of every kind were opened that were begun after `since` (monotonic): from new
        sources and the usual one, over IPv4 and IPv6."""
        new = {
            (attempt.fresh, attempt.sixth)
            for attempt in self.attempts[-400:]
            if attempt.opened and attempt.at > since
        }
        return len(new) == 4

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.failure = error

    def _send(self) -> None:
        known = [BLOCKED4[7].packed, BLOCKED6[7].packed]
        for number in itertools.count(256):
            if not self._going:
                return
            fresh = [BLOCKED4[number % 60_000], BLOCKED6[number]]
            sources = [known[number % 2], fresh[number % 2].packed, fresh[1 - number % 2].packed]
            if number % 8 == 0:
                sources.append([UNKNOWN4, UNKNOWN6][number // 8 % 2][number % 60_000].packed)
            for source in sources:
                self.frames.send(self.frames.syn(source).frame)
                self.sent += 1
            # A packet to another port from the same source shows that the way is open and the watcher sees
            # packets.
            self.frames.send(self.frames.syn(sources[1], OTHER_PORT).frame)
            for subject in self.subjects if number % 4 == 0 else ():
                self.allowed_frames.send(self.allowed_frames.syn(subject).frame)
            time.sleep(SEND_EVERY)  # pause: the pace of the sender

    def _watch(self) -> None:
        public = socket.inet_aton(FABRIKAM.public)
        while self._going:
            try:
                data, address = self._view.recvfrom(65_535)
            except (TimeoutError, OSError):  # OSError: the link is down for a moment
                self._lost()
                continue
            if address[2] != socket.PACKET_OUTGOING:
                self._take(data, public)

    def _take(self, data: bytes, public: bytes) -> None:
        if data[12:14] == b"\x08\x00" and data[23] == 6:
            tcp = 14 + (data[14] & 15) * 4
            # The tenant's public address, or its own if a fault removed the lab's translation with the other
            # rules.
            blocked = data[26:30] == public or data[26:28] in (b"\x0a\x02", b"\x0a\x03")
        elif data[12:14] == b"\x86\xdd" and data[20] == 6:
            tcp, blocked = 54, data[22:28] == FABRIKAM6
        else:
            return
        port = int.from_bytes(data[tcp + 2 : tcp + 4], "big")
        if port == SMTP_PORT:
            self.seen.add(int.from_bytes(data[tcp + 4 : tcp + 8], "big"))
        if blocked and port == SMTP_PORT:
            self.leaked.append(time.monotonic())
        elif blocked and port == OTHER_PORT:
            self.others += 1

    def _lost(self) -> None:
        self.missed += struct.unpack("II", self._view.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]

    def _listen(self) -> None:
        while self._going:
            with contextlib.suppress(TimeoutError):
                self._listener.accept()[0].close()

    def _connect(self) -> None:
        numbers = itertools.count(256)
        waiting: dict[socket.socket, tuple[float, bool, bool]] = {}
        chooser = selectors.DefaultSelector()
        due = time.monotonic()
        with namespaces.inside(self._lab.home(CONTOSO)):
            while self._going or waiting:
                now = time.monotonic()
                if self._going and now >= due:
                    due = max(due + _CONNECT_EVERY, now)
                    number = next(numbers)
                    self._begin(number, chooser, waiting)
                for key, _ in chooser.select(max(0.0, min(due - time.monotonic(), 0.05))):
                    assert isinstance(key.fileobj, socket.socket)
                    error = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    self._end(key.fileobj, chooser, waiting, opened=error == 0)
                self._oldest = min((at for at, *_ in waiting.values()), default=time.monotonic())
                late = time.monotonic() - PATIENCE
                for one in [one for one, (at, *_) in waiting.items() if at < late]:
                    self._end(one, chooser, waiting, opened=False)

    def _begin(
        self, number: int, chooser: selectors.BaseSelector, waiting: dict[socket.socket, tuple[float, bool, bool]]
    ) -> None:
        fresh, sixth = bool(number % 2), bool(number // 2 % 2)
        place = number if fresh else 7
        source = str(ALLOWED6[place] if sixth else ALLOWED4[place % 60_000])
        one = socket.socket(socket.AF_INET6 if sixth else socket.AF_INET)
        one.setblocking(False)
        # Close with a reset, so that the port does not stay in use for a minute.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        at = time.monotonic()
        try:
            one.bind((source, 0))
            one.connect_ex((MAIL6 if sixth else MAIL4, SMTP_PORT))
        except OSError:
            one.close()
            self.attempts.append(Attempt(at, fresh, sixth, opened=False))
            return
        waiting[one] = at, fresh, sixth
        chooser.register(one, selectors.EVENT_WRITE)

    def _end(
        self,
        one: socket.socket,
        chooser: selectors.BaseSelector,
        waiting: dict[socket.socket, tuple[float, bool, bool]],
        *,
        opened: bool,
    ) -> None:
        at, fresh, sixth = waiting.pop(one)
        chooser.unregister(one)
        one.close()
        self.attempts.append(Attempt(at, fresh, sixth, opened))


FABRIKAM6: Final = BLOCKED6.network_address.packed[:6]


def _without(tries: list[Attempt]) -> float:
    """The seconds in which no connection was opened, for the address family with more of them. A failed attempt
    counts as the time until the next attempt."""
    ordered = sorted(tries)
    return max(
        sum(
            following.at - attempt.at
            for attempt, following in itertools.pairwise(one for one in ordered if one.sixth == sixth)
            if not attempt.opened
        )
        for sixth in (False, True)
    )


def route(lab: Lab) -> None:
    """Makes the prefixes above local to the tenants' machines, and routes them there on the gateway."""
    # Only IPv4 lets a socket bind an address of a local route. This sysctl does for IPv6 what IPV6_FREEBIND on
    # each socket would do.
    namespaces.sysctl(lab.home(CONTOSO), "net.ipv6.ip_nonlocal_bind=1")
    for tenant, networks in (
        (CONTOSO, (ALLOWED4, ALLOWED6, SUBJECTS4, SUBJECTS6)),
        (FABRIKAM, (BLOCKED4, BLOCKED6)),
    ):
        home = [f"-{network.version} route replace local {network} dev lo" for network in networks]
        for line in home:
            namespaces.ip("-n", lab.home(tenant), *line.split())
        for network in networks:
            via = tenant.address4 if network.version == 4 else tenant.address6
            table = f" table {tenant.vni}" if network.version == 4 else ""
            line = f"-{network.version} route replace {network} via {via} dev {tenant.segment}{table}"
            namespaces.ip("-n", lab.gateway, *line.split())
