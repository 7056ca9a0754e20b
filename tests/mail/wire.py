"""tcpdump on the gateway: counts the packets to port 25 as they come in, by sender."""

from __future__ import annotations

import contextlib
import re
import signal
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from mail.machines import Machine
from portward.lab.agent import until

_HEADER, _RECORD = 24, struct.Struct("=IIII")
_SLL2 = 276  # LINKTYPE_LINUX_SLL2, the format of `tcpdump -i any`
_SLL2_LENGTH = 20


class Sender(NamedTuple):
    """An interface of the gateway, by index, and an address behind it."""

    interface: int
    address: str


class Wire:
    """A running tcpdump and its file."""

    def __init__(self, gateway: Machine) -> None:
        self._file = gateway.root / "tmp/wire.pcap"
        self._process = gateway.start(
            "tcpdump", "-i", "any", "-Q", "in", "-n", "-U", "--immediate-mode", "-B", "32768", "-s", "100",
            "-Z", "root", "-w", "/tmp/wire.pcap", "tcp dst port 25",  # noqa: S108 # in a root of its own
            stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: self._file.exists() and self._file.stat().st_size >= _HEADER, "tcpdump listens")

    def packets(self) -> Counter[Sender]:
        """How many packets have come in so far, by sender."""
        return Counter(_senders(self._file))

    def close(self) -> None:
        """Ends tcpdump; raises RuntimeError if the kernel could not give it every packet."""
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=60)
        lost = re.search(rb"(\d+) packets? dropped by kernel", said)
        if lost is None or int(lost[1]):
            raise RuntimeError(f"tcpdump has missed packets: {said.decode().strip()}")


@contextlib.contextmanager
def wire(gateway: Machine) -> Iterator[Wire]:
    """A `Wire` that is closed at the end."""
    found = Wire(gateway)
    try:
        yield found
    finally:
        found.close()


def _senders(file: Path) -> Iterator[Sender]:
    data = file.read_bytes()
    assert struct.unpack_from("=I", data, 20)[0] & 0xFFFF == _SLL2, "tcpdump names interfaces"
    place = _HEADER
    while place + _RECORD.size <= len(data):
        _, _, captured, _ = _RECORD.unpack_from(data, place)
        place += _RECORD.size
        if place + captured > len(data):
            return  # tcpdump is writing it just now
        packet = data[place : place + captured]
        place += captured
        index = struct.unpack_from(">I", packet, 4)[0]
        header = packet[_SLL2_LENGTH:]
        source = header[12:16] if header[0] >> 4 == 4 else header[8:24]
        yield Sender(index, str(ip_address(source)))
