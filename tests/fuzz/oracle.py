"""A worker over a real policy table, and an independent check of its verdict on a packet's bytes."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from portward.ipc import mark
from portward.ipc.counters import WorkerEvent
from portward.model import Address, Record
from portward.table.reader import Reader
from portward.table.writer import Writer
from unit.table.test_table import AZURE, ENFORCE, NOW, STORE, attachment, expected, identity, subscription
from unit.worker.test_slow_path import QueuedPacket, worker

# The worker reads the first `_READ` bytes of a packet, and follows fewer than `_LONGEST_CHAIN` extension headers.
_READ, _LONGEST_CHAIN = 512, 14

_RECORDS: tuple[Record, ...] = (
    subscription(1, "enterprise-agreement"),
    subscription(2, "pay-as-you-go"),
    attachment("10.2.0.0/17", 1),
    attachment("10.2.64.0/18", 2),
    attachment("2001:db8:1002:e::/64", 2),
    attachment("2001:db8:1002:e:8000::/65", 1),
    attachment("0.0.0.0/1", 2),
    attachment("8000::/1", 1),
)


class Oracle:
    """Classifies packets from the interface with index 1, behind which is segment vni1."""

    def __init__(self, folder: Path) -> None:
        writer = Writer(folder, AZURE, ENFORCE)
        writer.replace(_RECORDS, revision=1, store=STORE, now=NOW)
        writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
        writer.close()
        self._records = {identity(record): record for record in _RECORDS}
        self._reader = Reader.open(folder)
        self._worker, self._counters = worker(self._reader.lookup)

    def classify(self, data: bytes) -> mark.Class | None:
        """The class of the worker's verdict; None if it gives none, so that the worker or the chain `learn` drops
        the packet. Raises AssertionError if the verdict is wrong."""
        packet = QueuedPacket(data, before=0x00AB0000 | mark.MISS)
        packet.indev = 1
        self._worker.handle(packet)
        assert len(packet.said) == 1, "one verdict"
        assert not self._counters.events()[WorkerEvent.ERROR], "the worker met what it was not made for"
        port = port_of(data)
        assert packet.mark & ~mark.OWN == 0x00AB0000, "bits of others are kept"
        if packet.said == ["drop"] or packet.mark & mark.OWN == mark.MISS:
            assert port is None or len(data) > _READ or port[1] > _LONGEST_CHAIN, f"dropped, but to port {port[0]}"
            return None
        assert port is not None, "a verdict, but no TCP port in the packet"
        verdict = mark.Class(packet.mark & 7)
        reason, observed = expected(self._records, "vni1", source_of(data))
        if verdict is mark.Class.ALLOW:
            assert reason.allows, f"allowed, but {reason}"
        elif verdict is mark.Class.OBSERVED:
            assert observed
        else:
            assert not reason.allows, f"{verdict.name}, but {reason}"
        return verdict

    def close(self) -> None:
        """Closes the table."""
        self._reader.close()


def port_of(data: bytes) -> tuple[int, int] | None:
    """A packet's destination port by RFC 791 and RFC 8200, and the number of headers before TCP; None if the
    packet is not a first fragment of TCP with a port."""
    version, rest = data[:1].hex()[:1], memoryview(data)
    if version == "4":
        header, fragment = 4 * (data[0] % 16), int.from_bytes(data[6:8], "big") % 8192
        if len(data) < 20 or header < 20 or fragment or data[9] != 6:
            return None
        return _port(rest[header:], 0)
    if version != "6" or len(data) < 40:
        return None
    kind, rest, headers = data[6], rest[40:], 0
    while kind != 6:
        if len(rest) < 8 or kind not in (0, 43, 44, 51, 60):
            return None
        if kind == 44 and int.from_bytes(rest[2:4], "big") >> 3:
            return None
        length = {44: 8, 51: 4 * (rest[1] + 2)}.get(kind, 8 * (rest[1] + 1))
        kind, rest, headers = rest[0], rest[length:], headers + 1
    return _port(rest, headers)


def _port(tcp: memoryview, headers: int) -> tuple[int, int] | None:
    return (int.from_bytes(tcp[2:4], "big"), headers) if len(tcp) >= 4 else None


def source_of(data: bytes) -> Address:
    """A packet's source address by RFC 791 and RFC 8200."""
    return ip_address(data[12:16] if data[0] >> 4 == 4 else data[8:24])
