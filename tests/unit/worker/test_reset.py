"""The RST of a rejected connection has the right sequence numbers, addresses and checksums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from portward.worker.packet import parse
from portward.worker.reset import reset_for


def answered(packet: Packet) -> Packet | None:
    """The reset for a packet, parsed by scapy; None if there is none."""
    data = bytes(packet)
    found = parse(data)
    assert found is not None
    reply = reset_for(data, found.tcp)
    if reply is None:
        return None
    read: Packet = IP(reply) if reply[0] >> 4 == 4 else IPv6(reply)
    return read


def checksums_are_right(reply: Packet) -> bool:
    """Whether scapy calculates the same checksums."""
    again = reply.copy()
    del again[TCP].chksum
    if IP in again:
        del again[IP].chksum
    return bytes(again) == bytes(reply)


BASES = {"ipv4": IP(src="10.0.0.4", dst="203.0.113.25"), "ipv6": IPv6(src="2001:db8::4", dst="2001:db8:25::25")}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_syn_is_answered_with_the_number_after_it(base: Packet) -> None:
    reply = answered(base / TCP(sport=4000, dport=25, flags="S", seq=0xFFFFFFFF))
    assert reply is not None
    assert (reply.src, reply.dst) == (base.dst, base.src)
    assert (reply[TCP].sport, reply[TCP].dport) == (25, 4000)
    assert reply[TCP].flags == "RA"
    assert (reply[TCP].seq, reply[TCP].ack) == (0, 0)
    assert checksums_are_right(reply)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_data_of_an_open_connection_is_answered_with_what_it_acknowledged(base: Packet) -> None:
    reply = answered(base / TCP(sport=4000, dport=25, flags="PA", seq=7, ack=1234) / Raw(b"DATA"))
    assert reply is not None
    assert reply[TCP].flags == "R"
    assert reply[TCP].seq == 1234
    assert checksums_are_right(reply)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_data_in_a_syn_is_counted(base: Packet) -> None:
    reply = answered(base / TCP(dport=25, flags="S", seq=100) / Raw(b"EHLO"))
    assert reply is not None
    assert reply[TCP].ack == 105


def test_a_reset_is_never_answered() -> None:
    assert answered(BASES["ipv4"] / TCP(dport=25, flags="R")) is None
    assert answered(BASES["ipv6"] / TCP(dport=25, flags="RA")) is None


def test_a_fragment_that_ends_before_the_flags_is_not_answered() -> None:
    data = bytes(BASES["ipv4"] / TCP(dport=25))[:28]
    assert reset_for(data, 20) is None


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(1, 65535))
def test_checksums_are_right_for_any_numbers(seq: int, ack: int, flags: int, sport: int) -> None:
    for base in BASES.values():
        reply = answered(base / TCP(sport=sport, dport=25, seq=seq, ack=ack, flags=flags))
        assert (reply is None) == bool(flags & 0x04)
        assert reply is None or checksums_are_right(reply)
