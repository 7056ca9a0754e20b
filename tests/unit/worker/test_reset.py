"""The RST of a rejected connection has the right sequence numbers, addresses and checksums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from portward.worker.packet import parse
from portward.worker.reset import Resetter, framed, reset_for


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


SENDER, PORT = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\xfe"
# A SYN from 10.0.0.4, port 4000, to 203.0.113.25, and the RST to it; the same from 2001:db8::4 to 2001:db8:25::25.
SYN4 = BASES["ipv4"] / TCP(sport=4000, dport=25, flags="S", seq=1)
SYN6 = BASES["ipv6"] / TCP(sport=4000, dport=25, flags="S", seq=1)
RST4 = bytes.fromhex(
    "45000028 0000 4000 4006 f4b2 cb007119 0a000004 0019 0fa0 00000000 00000002 5014 0000 59f8 0000"
)
RST6 = bytes.fromhex(
    "60000000 0014 06 40 20010db8002500000000000000000025 20010db8000000000000000000000004"
    "0019 0fa0 00000000 00000002 5014 0000 4456 0000"
)
# The frame before the RST: to the sender, from the port, with the protocol and the tag.
TAGGED = {
    "untagged ipv4": (SYN4, "", "0800", RST4),
    "untagged ipv6": (SYN6, "", "86dd", RST6),
    "802.1Q ipv4": (SYN4, "8100 2064", "8100 2064 0800", RST4),
    "802.1Q ipv6": (SYN6, "8100 0001", "8100 0001 86dd", RST6),
    "802.1ad ipv4": (SYN4, "88a8 0fff", "88a8 0fff 0800", RST4),
    "802.1ad ipv6": (SYN6, "88a8 e000", "88a8 e000 86dd", RST6),
}


class Sent:
    """A fake packet socket, which records the frames that the kernel would send."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.names: list[str] = []

    def sendto(self, data: bytes, to: tuple[str, int, int, int, bytes]) -> None:
        name, protocol, _, _, address = to
        self.names.append(name)
        # As `dev_hard_header` makes an Ethernet header for a packet socket of type SOCK_DGRAM.
        self.frames.append(address + PORT + protocol.to_bytes(2, "big") + data)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The socket of all resetters. Interface 3 is vni1."""
    found = Sent()
    monkeypatch.setattr(Resetter, "__init__", lambda self: setattr(self, "_socket", found))
    monkeypatch.setattr("portward.worker.reset.socket.if_indextoname", {3: "vni1"}.__getitem__)
    return found


@pytest.mark.parametrize(("packet", "tag", "header", "rst"), TAGGED.values(), ids=TAGGED)
def test_a_reset_is_sent_with_the_tag_of_the_frame_that_it_answers(
    sent: Sent, packet: Packet, tag: str, header: str, rst: bytes
) -> None:
    reply = reset_for(bytes(packet), 20 if IP in packet else 40)
    assert reply is not None
    assert Resetter().send(reply, 3, SENDER, bytes.fromhex(tag))
    assert sent.names == ["vni1"]
    assert sent.frames[0].hex(" ") == (SENDER + PORT + bytes.fromhex(header) + rst).hex(" ")
    # The sender reads it as it would read any frame.
    frame = Ether(sent.frames[0])
    ports = [layer.vlan for layer in frame.iterpayloads() if isinstance(layer, Dot1Q)]
    assert ports == ([int(tag[5:], 16) & 0xFFF] if tag else [])
    assert (frame[TCP].sport, frame[TCP].dport, frame[TCP].flags) == (25, 4000, "RA")


def test_without_a_tag_the_frame_is_what_it_was(sent: Sent) -> None:
    assert Resetter().send(RST4, 3, SENDER)
    assert framed(RST4, b"") == (0x0800, RST4)
    assert sent.frames == [SENDER + PORT + b"\x08\0" + RST4]


def test_a_reset_is_not_sent_if_its_tag_or_its_receiver_is_not_known(sent: Sent) -> None:
    assert not Resetter().send(RST4, 3, SENDER, None)
    assert not Resetter().send(RST4, 3, None, b"\x81\0\0\x64")
    assert not sent.frames


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(1, 65535))
def test_checksums_are_right_for_any_numbers(seq: int, ack: int, flags: int, sport: int) -> None:
    for base in BASES.values():
        reply = answered(base / TCP(sport=sport, dport=25, seq=seq, ack=ack, flags=flags))
        assert (reply is None) == bool(flags & 0x04)
        assert reply is None or checksums_are_right(reply)
