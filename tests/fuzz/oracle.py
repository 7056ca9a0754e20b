"""A worker over a real policy table, with a second opinion on what it says of a packet's bytes."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from portward.gateway import mark
from portward.model import Address, Record
from portward.table.reader import Reader
from portward.table.writer import Writer
from unit.gateway.test_worker import QueuedPacket, worker
from unit.table.test_table import AZURE, ENFORCE, NOW, STORE, attachment, expected, identity, subscription

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
    """Judges packets that came from the interface with index 1, behind which is segment vni1."""

    def __init__(self, folder: Path) -> None:
        writer = Writer(folder, AZURE, ENFORCE)
        writer.replace(_RECORDS, revision=1, store=STORE, now=NOW)
        writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
        writer.close()
        self._records = {identity(record): record for record in _RECORDS}
        self._reader = Reader.open(folder)
        self._worker, self._tally = worker(self._reader.lookup)

    def judge(self, data: bytes) -> mark.Class | None:
        """What the worker says; None: dropped without a class. Raises AssertionError where it must not say so."""
        packet = QueuedPacket(data, before=0x00AB0000 | mark.MISS)
        packet.indev = 1
        self._worker.handle(packet)
        assert len(packet.said) == 1, "one verdict"
        if packet.said == ["drop"]:
            return None
        assert packet.mark & ~mark.OWN == 0x00AB0000, "bits of others are kept"
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


def source_of(data: bytes) -> Address:
    """The source as RFC 791 and RFC 8200 place it."""
    return ip_address(data[12:16] if data[0] >> 4 == 4 else data[8:24])
