"""A blocked tenant that sends SYNs to port 25 as raw Ethernet frames, until it is killed.

    python3 -m vm.guest.sender SEGMENT [SECONDS]

SECONDS is the pause between two rounds. A round has one SYN from the tenant's usual address and one from an
address without a cached verdict; every eighth round also has one from an address without an attachment. vni1002
sends over IPv6, too. One more SYN goes to another port: if the watcher sees it, the way to the uplink is open.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import struct
import sys
import time
from ipaddress import ip_address, ip_network

from vm.guest.world import BLOCKED6, MACS, MAIL4, MAIL6, OTHER_PORT, SEGMENTS, SMTP_PORT

_EVERY = 0.25  # seconds: the machine has little time for its tenants


def main() -> None:
    """Sends until it is ended by force."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    segment = sys.argv[1]
    every = float(sys.argv[2]) if len(sys.argv) > 2 else _EVERY
    _, interface, _, address, prefix = SEGMENTS[segment]
    out = _socket(interface)
    mac = bytes.fromhex(MACS[segment].replace(":", ""))
    own = bytes.fromhex(open(f"/sys/class/net/{interface}/address").read().strip().replace(":", ""))  # noqa: SIM115, PTH123
    fresh = ip_network(prefix)
    for number in itertools.count(1):
        sources = [(address, SMTP_PORT), (str(fresh[number % 4000 + 16]), SMTP_PORT), (address, OTHER_PORT)]
        if number % 8 == 0:  # from a second /20 without an attachment, so of no subscription
            sources.append((str(fresh.broadcast_address + 16 + number % 4000), SMTP_PORT))
        if segment == "vni1002":
            sources += [(f"{BLOCKED6}::4", SMTP_PORT), (f"{BLOCKED6}::{number % 60000 + 16:x}", SMTP_PORT)]
        for source, port in sources:
            with contextlib.suppress(OSError):  # the link is down
                out.send(frame(mac, own, source, MAIL6 if ":" in source else MAIL4, port, number))
        time.sleep(every)  # pause: the pace of the sender


def _socket(interface: str) -> socket.socket:
    while True:
        with contextlib.suppress(OSError):
            out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            out.bind((interface, 0))
            return out
        time.sleep(0.05)  # pause: of a poll


def frame(mac: bytes, own: bytes, source: str, destination: str, port: int, number: int) -> bytes:
    """An Ethernet frame with a SYN from `source` to a port of `destination`."""
    one, other = ip_address(source).packed, ip_address(destination).packed
    tcp = struct.pack(">HHIIBBHHH", 20_000 + number % 40_000, port, number, 0, 0x50, 2, 64_240, 0, 0)
    pseudo = one + other + struct.pack(">IHBB", len(tcp), 0, 0, 6)
    tcp = tcp[:16] + struct.pack(">H", _checksum(pseudo + tcp)) + tcp[18:]
    if len(one) == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 40, number & 0xFFFF, 0, 64, 6, 0) + one + other
        header = header[:10] + struct.pack(">H", _checksum(header)) + header[12:]
        return mac + own + b"\x08\x00" + header + tcp
    return mac + own + b"\x86\xdd" + struct.pack(">IHBB", 0x60000000, len(tcp), 6, 64) + one + other + tcp


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


if __name__ == "__main__":
    main()
