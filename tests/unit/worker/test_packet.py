"""Reading a queued packet finds the fields of packets that scapy has built, and raises for no bytes."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.ipsec import AH
from scapy.packet import Packet

from portward.worker.packet import parse

V4, V6 = "10.0.0.4", "2001:db8::4"
PADDING = [PadN(optdata=b"\0" * 12)]


def tcp(flags: str = "S", port: int = 25) -> TCP:
    """A TCP header to a port."""
    return TCP(sport=4000, dport=port, flags=flags)


READABLE = {
    "ipv4": IP(src=V4) / tcp(),
    "ipv4 with options": IP(src=V4, options=[IPOption_Router_Alert()] * 3) / tcp(),
    "ipv4 first fragment": IP(src=V4, flags="MF") / tcp(),
    "ipv6": IPv6(src=V6) / tcp(),
    "hop-by-hop": IPv6(src=V6) / IPv6ExtHdrHopByHop(options=PADDING) / tcp(),
    "destination options": IPv6(src=V6) / IPv6ExtHdrDestOpt(options=PADDING) / tcp(),
    "routing": IPv6(src=V6) / IPv6ExtHdrRouting(type=4, addresses=["2001:db8::1"]) / tcp(),
    "atomic fragment": IPv6(src=V6) / IPv6ExtHdrFragment(nh=6) / tcp(),
    "authentication": IPv6(src=V6) / AH(nh=6, payloadlen=4, icv=b"\0" * 12) / tcp(),
    "a chain": IPv6(src=V6)
    / IPv6ExtHdrHopByHop(options=PADDING)
    / IPv6ExtHdrDestOpt(options=PADDING)
    / IPv6ExtHdrFragment(nh=6, m=1)
    / tcp(),
}


@pytest.mark.parametrize("packet", READABLE.values(), ids=READABLE)
def test_source_port_and_place_are_found(packet: Packet) -> None:
    data = bytes(packet)
    found = parse(data)
    assert found is not None
    assert ip_address(found.source) == ip_address(V6 if IPv6 in packet else V4)
    assert found.port == 25
    assert data[found.tcp :] == bytes(packet[TCP]) or data[found.tcp : found.tcp + 4] == bytes(packet[TCP])[:4]
    assert found.attempt


UNREADABLE = {
    "nothing": b"",
    "udp": bytes(IP(src=V4) / UDP(dport=25)),
    "ipv4 later fragment": bytes(IP(src=V4, frag=1, proto=6) / tcp()),
    "ipv6 later fragment": bytes(IPv6(src=V6) / IPv6ExtHdrFragment(nh=6, offset=1) / tcp()),
    "ipv6 udp": bytes(IPv6(src=V6) / UDP(dport=25)),
    "cut before the ports": bytes(IP(src=V4) / tcp())[:23],
    "cut in an extension header": bytes(IPv6(src=V6) / IPv6ExtHdrHopByHop(options=PADDING) / tcp())[:44],
    "an ipv4 header length of nothing": b"\x40" + bytes(IP(src=V4) / tcp())[1:],
    "version 5": b"\x55" + bytes(IP(src=V4) / tcp())[1:],
    "headers without end": bytes(IPv6(src=V6, nh=0)) + b"\0\0\0\0\0\0\0\0" * 40,
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_tcp_segment_is_none(data: bytes) -> None:
    assert parse(data) is None


@pytest.mark.parametrize(
    ("flags", "attempt"),
    [("S", True), ("SEC", True), ("SPU", True), ("SA", False), ("A", False), ("SF", False), ("", False)],
)
def test_an_attempt_is_a_syn_that_opens(flags: str, attempt: bool) -> None:
    found = parse(bytes(IP(src=V4) / tcp(flags)))
    assert found is not None
    assert found.attempt is attempt


@given(st.binary(max_size=120))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    found = parse(data)
    assert found is None or len(found.source) in (4, 16)


@given(st.binary(max_size=80), st.sampled_from([b"\x45", b"\x46", b"\x60"]))
def test_no_bytes_behind_a_version_make_it_raise(data: bytes, version: bytes) -> None:
    found = parse(version + data)
    assert found is None or found.tcp + 4 <= len(data) + 1
