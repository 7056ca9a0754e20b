"""Nearly valid packets: those of the evasion corpus, with other sources, flipped bits, and changed lengths."""

from __future__ import annotations

from random import Random
from typing import Final

from kernel.evasion.tricks import FOUR, SIX
from portward.lab.topology import FABRIKAM, MAIL4, MAIL6

_SOURCE4, _SOURCE6 = "10.2.0.1", f"2001:db8:{FABRIKAM.vni}:e::1"
_LONGEST: Final = 1400
# Offsets in the IPv4, IPv6 and TCP headers of fields that decide how a packet is parsed, and values for them.
_PLACES: Final = (0, 1, 2, 3, 6, 7, 8, 9, 20, 22, 23, 32, 33, 40, 41, 42, 43, 52, 53, 56)
_TELLING: Final = (0, 1, 4, 6, 17, 25, 41, 43, 44, 47, 50, 51, 58, 59, 60, 132, 135, 139, 140, 255)


def templates() -> list[bytes]:
    """The packets of the evasion corpus that are changed; of a trick with many packets, only a few."""
    found: list[bytes] = []
    for tricks, source, to in ((FOUR, _SOURCE4, MAIL4), (SIX, _SOURCE6, MAIL6)):
        for trick in tricks:
            packets = trick.build(source, to)
            found += [bytes(packet)[:_LONGEST] for packet in packets[:: max(1, len(packets) // 4)]]
    return found


TEMPLATES: Final = templates()


def mutated(random: Random) -> bytes:
    """A random packet, from the IP header on."""
    if random.random() < 0.02:
        version = random.choice((0x45, 0x60, 0x4F, 0x00))
        return bytes([version]) + random.randbytes(random.randrange(200))
    packet = bytearray(random.choice(TEMPLATES))
    four = packet[0] >> 4 == 4
    _new_source(packet, random, four=four)
    for _ in range(random.choice((0, 0, 1, 1, 2, 4))):
        _change(packet, random)
    if random.random() < 0.1:
        del packet[random.randrange(len(packet) + 1) :]
    if random.random() < 0.1:
        packet += random.randbytes(random.randrange(64))
    if len(packet) >= 20 and packet[0] >> 4 == 4 and random.random() < 0.95:
        _sum(packet)
    return bytes(packet)


def _new_source(packet: bytearray, random: Random, *, four: bool) -> None:
    """Sets a random source: mostly from the tenant's own prefix, sometimes any address."""
    place, size, kept = (12, 4, 2) if four else (8, 16, 8)
    if random.random() < 0.1:
        kept = 0
    packet[place + kept : place + size] = random.randbytes(size - kept)


def _change(packet: bytearray, random: Random) -> None:
    if not packet:
        return
    place = random.choice(_PLACES) if random.random() < 0.5 else random.randrange(len(packet))
    if place >= len(packet):
        return
    if random.random() < 0.5:
        packet[place] = random.choice(_TELLING)
    else:
        packet[place] ^= 1 << random.randrange(8)


def _sum(packet: bytearray) -> None:
    """Corrects the IPv4 header checksum and, mostly, the length. Otherwise the kernel drops the packet at once."""
    header = min(max(20, (packet[0] & 15) * 4), len(packet)) & ~1
    packet[2:4] = len(packet).to_bytes(2, "big")
    packet[10:12] = bytes(2)
    total = sum(int.from_bytes(packet[at : at + 2], "big") for at in range(0, header, 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    packet[10:12] = (~total & 0xFFFF).to_bytes(2, "big")
