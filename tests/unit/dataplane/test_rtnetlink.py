"""Messages of the kernel become interfaces, and the ports of tunnels that end here."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, cast

import pytest

from portward.base.netlink import HEADER, NLMSG_DONE, NLMSG_ERROR, attribute, attributes_of, nest
from portward.dataplane import dumpsocket, genetlink, rtnetlink, tunnels
from portward.dataplane.links import Device, Links


def link(
    index: int, name: bytes, *parts: bytes, family: int = socket.AF_UNSPEC, kind: str = "", data: bytes = b""
) -> bytes:
    """The body of a message of an interface."""
    info = attribute(1, kind.encode() + b"\0") + nest(2, data) if kind else b""
    return (
        struct.pack("=BxHiII", family, 1, index, 0, 0)
        + attribute(3, name + b"\0")
        + b"".join(parts)
        + (nest(18, info) if kind else b"")
    )


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def taken(kind: int, body: bytes) -> Any:
    """The event in a message."""
    return rtnetlink._event(kind, body)  # the part that needs no socket and no kernel


def test_master_and_lower_device_are_read() -> None:
    event = taken(16, link(7, b"a\xff", number(10, 3), number(5, 4), kind="vlan"))
    assert event == (False, Device(7, "a\udcff", "vlan", 3, 4))


def test_a_lower_device_of_another_namespace_is_none() -> None:
    """Its index belongs to another interface in this namespace."""
    assert taken(16, link(7, b"mv", number(5, 4), number(37, 0), kind="macvlan")).device.lower == 0


@pytest.mark.parametrize("kind", ["veth", "netkit", "vxcan"])
def test_the_other_end_of_a_pair_is_no_lower_device(kind: str) -> None:
    assert taken(16, link(7, b"a", number(5, 4), kind=kind)).device.lower == 0


def test_a_device_that_names_itself_stands_on_nothing() -> None:
    assert taken(16, link(7, b"a", number(5, 7))).device.lower == 0


def test_what_a_bridge_says_of_a_port_is_no_end_of_it() -> None:
    """If a port leaves a bridge, the bridge reports it as deleted, but the interface stays."""
    assert taken(17, link(7, b"vni1", number(10, 3), family=socket.AF_BRIDGE)) is None
    assert taken(17, link(7, b"vni1")).deleted


def test_a_message_without_a_name_says_nothing() -> None:
    """A wireless driver sends such messages."""
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 1, 7, 0, 0) + attribute(11, b"news")
    assert taken(16, body) is None


@pytest.mark.parametrize(
    ("kind", "number_", "ports"),
    [
        ("vxlan", 15, {7777}),
        ("geneve", 5, {7777}),
        ("bareudp", 1, {7777}),
        ("amt", 2, {7777}),
        ("vlan", 15, set()),
    ],
)
def test_devices_say_their_ports(kind: str, number_: int, ports: set[int]) -> None:
    data = attribute(number_, struct.pack(">H", 7777))
    assert taken(16, link(7, b"t", kind=kind, data=data)).device.ports == ports


def test_gtp_listens_where_its_programs_do() -> None:
    assert taken(16, link(7, b"t", kind="gtp")).device.ports == {2152, 3386}


def test_no_port_is_none() -> None:
    """Examples are a GENEVE device that inherits its port, and a truncated attribute."""
    assert tunnels.ports_of("vxlan", {15: b"\0\0"}) == frozenset()
    assert tunnels.ports_of("vxlan", {15: b"\0"}) == frozenset()


class Kernel:
    """Generic netlink with FOU, L2TP and WireGuard, as Linux answers it."""

    def __init__(self, _: int) -> None:
        pass

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def dump(self, kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        """The messages."""
        command = payload[0]
        head = struct.pack("=BBH", command, 1, 0)
        families = {"fou": 30, "l2tp": 31, "wireguard": 32, "nl80211": 33}
        match kind, command:
            case 16, 3:
                return [
                    (16, head + attribute(2, name.encode() + b"\0") + attribute(1, struct.pack("=H", id_)))
                    for name, id_ in families.items()
                ]
            case 30, 3:
                return [
                    (30, head + attribute(1, struct.pack(">H", port)) + attribute(2, b"\2"))
                    for port in (5555, 5556)
                ]
            case 31, 4:  # one over IP has no port
                return [(31, head + attribute(26, struct.pack("=H", 1701))), (31, head + attribute(9, bytes(4)))]
            case 32, 0:
                assert dict(attributes_of(payload, 4)) == {1: struct.pack("=I", 9)}
                return [(32, head + attribute(6, struct.pack("=H", 51820)))]
        raise AssertionError(f"{kind} {command} is not asked")


def test_ports_without_a_device_come_from_generic_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genetlink, "DumpSocket", Kernel)
    devices = [Device(8, "vx", "vxlan", ports=frozenset((4790,))), Device(9, "wg0", "wireguard")]
    assert genetlink.tunnel_ports(devices) == tunnels.Ports(
        frozenset((4790, 5555, 5556, 1701)), frozenset((51820,))
    )
    assert tunnels.ending_here(devices) == devices


# --- dumps ---

INTERRUPTED = 0x10


def message(kind: int, body: bytes, flags: int = 0, sequence: int = 0) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body


class Dumping:
    """A netlink socket that answers each dump with the next list of (type, flags, body), one datagram each."""

    def __init__(self, *answers: list[tuple[int, int, bytes]], stray: bytes = b"") -> None:
        self._answers, self._stray = list(answers), stray
        self._waiting: list[bytes] = []
        self.dumps, self.closed = 0, False

    def bind(self, _: tuple[int, int]) -> None:
        """Takes any address."""

    def send(self, data: bytes) -> None:
        self.dumps += 1
        sequence = HEADER.unpack_from(data)[3]
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self._waiting = [self._stray] if self._stray else []
        self._waiting += [message(kind, body, flags, sequence) for kind, flags, body in answer]

    def recv(self, _: int) -> bytes:
        return self._waiting.pop(0)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def dumping(monkeypatch: pytest.MonkeyPatch) -> Callable[[Dumping], Dumping]:
    """Replaces the next netlink socket by the given one."""

    def put(kernel: Dumping) -> Dumping:
        monkeypatch.setattr(dumpsocket, "socket", FakeSocketModule(kernel))
        return kernel

    return put


class FakeSocketModule:
    """The part of module socket that opens a netlink socket."""

    AF_NETLINK, SOCK_RAW, SOCK_CLOEXEC = socket.AF_NETLINK, socket.SOCK_RAW, socket.SOCK_CLOEXEC

    def __init__(self, kernel: Dumping) -> None:
        self._kernel = kernel

    def socket(self, *_: int) -> Dumping:
        return self._kernel


END = (NLMSG_DONE, 0, bytes(4))
Put = Callable[[Dumping], Dumping]


def test_the_interfaces_are_those_of_a_whole_dump(dumping: Put) -> None:
    """Messages of bridges and answers to older requests are not among them."""
    of_bridge = link(7, b"port", family=socket.AF_BRIDGE)
    kernel = dumping(
        Dumping(
            [(16, 0, link(1, b"lo")), (16, 0, of_bridge), (16, 0, link(7, b"port")), END],
            stray=message(16, link(9, b"stray"), sequence=0),
        )
    )
    assert rtnetlink.devices() == (Device(1, "lo"), Device(7, "port"))
    assert kernel.closed


def test_a_dump_that_a_change_interrupts_is_read_again(dumping: Put) -> None:
    kernel = dumping(Dumping([(16, INTERRUPTED, link(1, b"old")), END], [(16, 0, link(1, b"new")), END]))
    assert rtnetlink.devices() == (Device(1, "new"),)
    assert kernel.dumps == 2


def test_a_dump_that_is_always_interrupted_is_an_error(dumping: Put) -> None:
    kernel = dumping(Dumping([(16, 0, link(1, b"lo")), (NLMSG_DONE, INTERRUPTED, bytes(4))]))
    with pytest.raises(BlockingIOError, match="changes all the time"):
        rtnetlink.devices()
    assert kernel.closed


@pytest.mark.parametrize("kind", [NLMSG_ERROR, NLMSG_DONE], ids=["at once", "half-way"])
def test_a_dump_that_fails_raises_the_errno_of_the_kernel(dumping: Put, kind: int) -> None:
    kernel = dumping(Dumping([(16, 0, link(1, b"lo")), (kind, 0, struct.pack("=i", -errno.ENOMEM))]))
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        rtnetlink.devices()
    assert kernel.closed


# --- following ---


class Events:
    """A socket pair in place of the kernel's notices. Its datagrams come from `sender`."""

    def __init__(self, sender: int = 0) -> None:
        self._sender = sender
        self._kernel, self.events = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.events.setblocking(False)

    def send(self, *messages: bytes) -> None:
        """Sends a datagram with these messages."""
        self._kernel.send(b"".join(messages))

    # The methods of a socket that `rtnetlink` uses.

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._kernel.close()
        self.events.close()

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        return self.events.recv(size), (self._sender, 0)


def news(*datagrams: list[bytes], known: dict[int, Device], sender: int = 0) -> Links:
    """The interfaces after these datagrams, all of which wait when `rtnetlink` reads the first one."""
    found = Events(sender)

    async def life() -> Links:
        async def first(events: Events, size: int) -> tuple[bytes, tuple[int, int]]:
            return events.recvfrom(size)

        loop = asyncio.get_running_loop()
        cast(Any, loop).sock_recvfrom = first
        return await asyncio.wait_for(rtnetlink._next(known, cast(Any, found)), 30)

    with found:
        for datagram in datagrams:
            found.send(*datagram)
        return asyncio.run(life())


LO, PORT = Device(1, "lo"), Device(7, "port")


@pytest.mark.parametrize(
    ("messages", "devices", "touched"),
    [
        ([message(16, link(8, b"new"))], {LO, PORT, Device(8, "new")}, set()),
        ([message(17, link(7, b"port"))], {LO}, {7}),
        ([message(16, link(7, b"other"))], {LO, Device(7, "other")}, {7}),
        ([message(17, link(7, b"port")), message(16, link(7, b"port"))], {LO, PORT}, {7}),
        ([message(16, link(7, b"port", number(10, 3)))], {LO, Device(7, "port", master=3)}, set()),
        ([message(17, link(9, b"unknown")), message(16, link(8, b"new"))], {LO, PORT, Device(8, "new")}, set()),
    ],
    ids=["made", "deleted", "renamed", "deleted and made again", "another master", "one that was not known"],
)  # fmt: skip
@pytest.mark.parametrize("together", [True, False], ids=["one datagram", "several"])
def test_an_index_that_may_have_another_owner_counts_as_touched(
    messages: list[bytes], devices: set[Device], touched: set[int], together: bool
) -> None:
    """An index that was deleted in between is touched even if everything looks as before."""
    datagrams = [messages] if together else [[one] for one in messages]
    links = news(*datagrams, known={1: LO, 7: PORT})
    assert (set(links.devices), set(links.touched)) == (devices, touched)


def test_events_that_change_nothing_are_not_reported() -> None:
    same = message(16, link(7, b"port"))
    links = news([same], [message(3, b"")], [message(16, link(8, b"new"))], known={7: PORT})
    assert (set(links.devices), links.touched) == ({PORT, Device(8, "new")}, frozenset())


def following(monkeypatch: pytest.MonkeyPatch, *rounds: Links | Exception) -> list[Links]:
    """The results of `follow` if, in each round, the kernel sends one `Links` and then fails. If a round is an
    error, the kernel sends nothing in it. The last round ends with EOFError."""
    left = list(rounds)

    async def once(before: dict[int, Device], _: object, *, first: bool) -> AsyncGenerator[Links, None]:
        if not left:
            raise EOFError
        one = left.pop(0)
        if isinstance(one, Exception):
            raise one
        yield one._replace(touched=frozenset() if first else frozenset(before))
        raise OSError(errno.ENOBUFS, "dropped")

    monkeypatch.setattr(rtnetlink, "_follow_once", once)
    monkeypatch.setattr(rtnetlink, "_RETRY_S", 0)
    found = []

    async def life() -> None:
        async with aclosing(rtnetlink.follow()) as links:
            async for one in links:
                found.append(one)

    with pytest.raises(EOFError):
        asyncio.run(life())
    return found


def links_of(*devices: Device) -> Links:
    return Links({device.ifindex: device.name for device in devices}, frozenset(), devices)


def test_after_dropped_events_every_index_from_before_counts_as_touched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same failure is logged once, until the interfaces could be read again."""
    broken = OSError(errno.ENFILE, "too many files")
    found = following(monkeypatch, links_of(LO, PORT), broken, broken, links_of(LO), links_of(LO, PORT))
    assert [(links.touched, set(links.devices)) for links in found] == [
        (frozenset(), {LO, PORT}),
        (frozenset((1, 7)), {LO}),
        (frozenset((1,)), {LO, PORT}),
    ]
    assert caplog.text.count("too many files") == 1
    assert caplog.text.count("dropped") == 3


def test_a_kernel_that_cannot_be_followed_at_all_is_an_error_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def once(*_: object, **__: object) -> AsyncGenerator[Links, None]:
        raise PermissionError(errno.EPERM, "not permitted")
        yield

    monkeypatch.setattr(rtnetlink, "_follow_once", once)

    async def life() -> None:
        async with aclosing(rtnetlink.follow()) as links:
            await anext(links)

    with pytest.raises(PermissionError):
        asyncio.run(life())


def test_the_first_list_is_read_after_the_events_are_subscribed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a change in between is in both."""
    order = []
    events = Events()

    def subscribe() -> Events:
        order.append("events")
        return events

    def dump() -> tuple[Device, ...]:
        order.append("dump")
        return (LO,)

    monkeypatch.setattr(rtnetlink, "_events", subscribe)
    monkeypatch.setattr(rtnetlink, "devices", dump)

    async def life() -> Links:
        async with aclosing(rtnetlink.follow()) as links:
            return await anext(links)

    assert asyncio.run(life()) == links_of(LO)
    assert order == ["events", "dump"]


def test_a_name_that_no_interface_can_have_has_no_index() -> None:
    assert rtnetlink.index_of("a name that is longer than any") is None
    assert rtnetlink.index_of("nul\0") is None
    assert rtnetlink.index_of("lo") == socket.if_nametoindex("lo")
