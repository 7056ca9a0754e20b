"""The reader with the library NetfilterQueue gives no verdict on what may be a bridged frame."""

from __future__ import annotations

import pytest

from portward.ipc import mark
from portward.ipc.counters import WorkerEvent
from portward.model import Reason
from portward.table.layout import LookupResult
from portward.worker.messages import FORWARD, PREROUTING
from portward.worker.single import guarded
from unit.worker.test_slow_path import SYN, QueuedPacket, finding, worker

# Behind these interfaces are segments.
BRIDGE_WITH_SEGMENT, PORT_WITH_SEGMENT = 3, 4


class LibraryPacket(QueuedPacket):
    """A packet of the library, in which 0 means no interface."""

    def __init__(self, indev: int, physindev: int, *, hook: int = PREROUTING, before: int = mark.MISS) -> None:
        super().__init__(SYN, before, hook)
        self.indev, self.physindev = indev, physindev


def lookup(index: int, source: bytes) -> LookupResult | None:
    """Allows each source behind the two segments."""
    return finding(Reason.ALLOWED_OFFER) if index in (BRIDGE_WITH_SEGMENT, PORT_WITH_SEGMENT) else None


@pytest.mark.parametrize("port", [0, 9], ids=["no port", "a port without a segment"])
def test_a_routed_packet_gets_the_verdict_of_its_interface(port: int) -> None:
    """With br_netfilter it has a port, too."""
    found, _ = worker(lookup)
    packet = LibraryPacket(BRIDGE_WITH_SEGMENT, port)
    guarded(found.handle, lookup)(packet)
    assert (packet.said, packet.mark & mark.CLASS) == (["accept"], mark.Class.ALLOW)


@pytest.mark.parametrize("bridge", [BRIDGE_WITH_SEGMENT, 50], ids=["a segment", "no segment"])
def test_what_may_be_a_bridged_frame_is_refused(bridge: int) -> None:
    found, counters = worker(lookup)
    answer = guarded(found.handle, lookup)
    packets = [
        LibraryPacket(bridge, PORT_WITH_SEGMENT, before=0x00AB0000 | mark.MISS),
        LibraryPacket(bridge, PORT_WITH_SEGMENT, before=mark.AGAIN),
        LibraryPacket(bridge, PORT_WITH_SEGMENT, hook=FORWARD),
    ]
    for packet in packets:
        answer(packet)
    assert [packet.said for packet in packets] == [["accept"], ["drop"], ["drop"]]
    assert packets[0].mark == 0x00AB0000 | mark.MISS, "the chain `learn` drops it"
    assert counters.events()[WorkerEvent.NO_SEGMENT] == 3
    assert not list(counters.verdicts())


def test_if_the_table_cannot_be_read_a_packet_with_a_port_is_dropped() -> None:
    def broken(index: int, source: bytes) -> LookupResult:
        raise RuntimeError("the table is gone")

    found, counters = worker(broken)
    packet = LibraryPacket(BRIDGE_WITH_SEGMENT, PORT_WITH_SEGMENT)
    guarded(found.handle, broken)(packet)
    assert packet.said == ["drop"]
    assert counters.events()[WorkerEvent.ERROR] == 1
