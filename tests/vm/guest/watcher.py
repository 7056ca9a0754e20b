"""Watches every packet on both uplinks, from before the gateway has a network until the machine is off.

A packet of a blocked tenant to port 25 is reported to the host at once, because the machine may be off the next
moment. The first few are reported one by one, after that one in a thousand. The counts are written to
/run/vm/watch.json every half second.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import time
from ipaddress import ip_address, ip_network
from pathlib import Path

from vm.guest.keys import hold_timestamps
from vm.guest.reporting import report
from vm.guest.world import BLOCKED, BLOCKED6, BRIDGED, OTHER_PORT, RUN, SEGMENTS, SMTP_PORT

_ALL = 0x0003  # ETH_P_ALL
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_REPORTED = 5
_BLOCKED4 = [ip_network(SEGMENTS[segment][3] + "/16", strict=False) for segment in BLOCKED]
_BRIDGED4 = [ip_network(SEGMENTS[segment][3] + "/16", strict=False) for segment in BRIDGED]
_BLOCKED6 = ip_network(f"{BLOCKED6}::/64")


def main() -> None:
    """Watches until it is ended by force."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    view = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    view.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
    hold_timestamps(view)
    view.settimeout(0.5)
    numbers = {"leaked": 0, "others": 0, "allowed": 0, "missed": 0, "bridged": 0, "at": 0.0}
    written = 0.0
    while True:
        try:
            data, address = view.recvfrom(256)
            if address[2] != socket.PACKET_OUTGOING:
                _take(data, numbers)
        except TimeoutError:
            pass
        if time.monotonic() > written + 0.5:
            numbers["missed"] += struct.unpack("II", view.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
            numbers["at"] = time.monotonic()
            new = RUN / "watch.new"
            new.write_text(json.dumps(numbers))
            new.rename(RUN / "watch.json")
            written = time.monotonic()


def _take(data: bytes, numbers: dict[str, float]) -> None:
    if data[12:14] == b"\x08\x00" and data[23] == 6:
        source, tcp = ip_address(data[26:30]), 14 + (data[14] & 15) * 4
        blocked = any(source in network for network in _BLOCKED4)
        bridged = any(source in network for network in _BRIDGED4)
    elif data[12:14] == b"\x86\xdd" and data[20] == 6:
        source, tcp = ip_address(data[22:38]), 54
        blocked, bridged = source in _BLOCKED6, False
    else:
        return
    port = int.from_bytes(data[tcp + 2 : tcp + 4], "big")
    if blocked and bridged and port in (SMTP_PORT, OTHER_PORT):
        numbers["bridged"] += 1
    if port == SMTP_PORT and blocked:
        numbers["leaked"] += 1
        if numbers["leaked"] <= _REPORTED or numbers["leaked"] % 1000 == 0:
            report(leak=f"packet {numbers['leaked']:.0f} of {source}, {time.monotonic():.2f} s after power-on")
    elif port == SMTP_PORT:
        numbers["allowed"] += 1
    elif port == OTHER_PORT and blocked:
        numbers["others"] += 1


def read() -> dict[str, float]:
    """The counts so far. `leaked`: packets of blocked tenants to port 25; `others`: theirs to another port;
    `allowed`: packets of other sources to port 25; `bridged`: how many of `leaked` and `others` are bridged
    tenants'; `missed`: packets that the watcher's socket lost; `at`: the time of the counts (monotonic)."""
    found: dict[str, float] = json.loads(Path(RUN, "watch.json").read_text())
    return found


def newer(seconds: float = 60.0) -> dict[str, float]:
    """Counts that were written after this call and have more packets to another port than before it. So the
    watcher and the senders are alive. Raises TimeoutError after `seconds`."""
    began, before = time.monotonic(), read()["others"]
    while (found := read())["at"] <= began or found["others"] <= before:
        if time.monotonic() > began + seconds:
            raise TimeoutError(f"not within {seconds:.0f} s: packets of blocked tenants to another port are seen")
        time.sleep(0.1)  # pause: of a poll
    return found


if __name__ == "__main__":
    main()
