"""Messages of the kernel become interfaces, and the ports of tunnels that end here."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from portward.base.netlink import attribute, attributes_of, nest
from portward.dataplane import genetlink, rtnetlink, tunnels
from portward.dataplane.links import Device


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
    return rtnetlink._event(kind, body)  # what the socket gives, without a kernel


def test_master_and_lower_device_are_read() -> None:
    event = taken(16, link(7, b"a\xff", number(10, 3), number(5, 4), kind="vlan"))
    assert event == (False, Device(7, "a\udcff", "vlan", 3, 4))


def test_a_lower_device_of_another_namespace_is_none() -> None:
    """Its number is another interface here."""
    assert taken(16, link(7, b"mv", number(5, 4), number(37, 0), kind="macvlan")).device.lower == 0


@pytest.mark.parametrize("kind", ["veth", "netkit", "vxcan"])
def test_the_other_end_of_a_pair_is_no_lower_device(kind: str) -> None:
    assert taken(16, link(7, b"a", number(5, 4), kind=kind)).device.lower == 0


def test_a_device_that_names_itself_stands_on_nothing() -> None:
    assert taken(16, link(7, b"a", number(5, 7))).device.lower == 0


def test_what_a_bridge_says_of_a_port_is_no_end_of_it() -> None:
    """A port that leaves is deleted for the bridge alone."""
    assert taken(17, link(7, b"vni1", number(10, 3), family=socket.AF_BRIDGE)) is None
    assert taken(17, link(7, b"vni1")).deleted


def test_a_message_without_a_name_says_nothing() -> None:
    """A wireless driver sends such ones."""
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
    """A GENEVE that inherits, a truncated attribute."""
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
