"""What the kernel has dropped lately, by machine: the counters of the elements that remember refused sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from msgspec.structs import replace

from portward.dataplane.names import LIMITED_SETS, TABLE, VERDICT_SETS, LimitResult
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.rtnetlink import index_of
from portward.dataplane.verdict_cache import Source
from portward.errors import PortwardError
from portward.ipc.mark import Class
from portward.model import Address, Network
from portward.ops.diagnosis.facts import Drops, Kernel, Machine

# Set → what its elements' packets are.
_FIELDS: Final = {
    VERDICT_SETS[Class.DENY]: "refused",
    VERDICT_SETS[Class.REFUSED]: "refused",
    LIMITED_SETS[LimitResult.OVER]: "beyond_limit",
    VERDICT_SETS[Class.OBSERVED]: "observed",
}
_UNKNOWN: Final = VERDICT_SETS[Class.UNKNOWN]

# Gives the prefix whose attachment a source is of.
Owner = Callable[[str, Address], Network | None]


def with_drops(machines: Sequence[Machine], owner: Owner) -> tuple[tuple[Machine, ...], Kernel]:
    """The machines with what the kernel dropped of each, as far as it says so, and whether it does. `owner` says
    of which prefix a source in a segment is: a more specific one may be somebody else's."""
    try:
        netlink = NfNetlink()
    except PortwardError:
        return tuple(machines), Kernel.NOT_PERMITTED
    try:
        if not netlink.sets(TABLE):
            return tuple(machines), Kernel.NO_RULESET
        reading = _Reading(netlink, owner)
        found = tuple(replace(machine, drops=reading.of(machine)) for machine in machines)
    except OSError:
        return tuple(machines), Kernel.NOT_PERMITTED
    finally:
        netlink.close()
    known = not found or any(machine.drops is not None for machine in found)
    return found, Kernel.ASKED if known else Kernel.NO_INTERFACE


def of_nobody(segment: str, address: Address) -> tuple[Drops | None, Kernel]:
    """What the kernel holds of a source of nobody."""
    index = _index(segment)
    if index is None:
        return None, Kernel.NO_INTERFACE
    try:
        netlink = NfNetlink()
    except PortwardError:
        return None, Kernel.NOT_PERMITTED
    try:
        if not netlink.sets(TABLE):
            return None, Kernel.NO_RULESET
        source = Source(index, address.packed)
        held = netlink.element(TABLE, _UNKNOWN + source.family, source.key)
    except OSError:
        return None, Kernel.NOT_PERMITTED
    finally:
        netlink.close()
    return Drops(nobody=held is not None), Kernel.ASKED


class _Reading:
    """One reading of the sets: single elements where the source is known, all of them once for prefixes."""

    def __init__(self, netlink: NfNetlink, owner: Owner) -> None:
        self._netlink, self._owner = netlink, owner
        self._all = lru_cache(maxsize=None)(self._elements)

    def of(self, machine: Machine) -> Drops | None:
        """What was dropped of a machine; None where its segment is no interface here."""
        index = _index(machine.segment)
        if index is None:
            return None
        if machine.address.prefixlen == machine.address.max_prefixlen:
            return self._of_source(Source(index, machine.address.network_address.packed))
        return self._of_prefix(index, machine)

    def _of_source(self, source: Source) -> Drops:
        packets = dict.fromkeys(_FIELDS.values(), 0)
        for name, field in _FIELDS.items():
            found = self._netlink.element(TABLE, name + source.family, source.key)
            packets[field] += 0 if found is None else found.packets
        return _drops(packets, int(any(packets.values())))

    def _of_prefix(self, index: int, machine: Machine) -> Drops:
        packets = dict.fromkeys(_FIELDS.values(), 0)
        sources = set()
        for field, source, number in self._all(machine.address.version):
            if source.link != index:
                continue
            address = ip_address(source.address)
            if address in machine.address and self._owner(machine.segment, address) == machine.address:
                packets[field] += number
                sources.add(source)
        return _drops(packets, len(sources))

    def _elements(self, version: int) -> list[tuple[str, Source, int]]:
        return [
            (field, Source.of(element.key), element.packets)
            for name, field in _FIELDS.items()
            for element in self._netlink.elements(TABLE, f"{name}{version}")
        ]


def _drops(packets: dict[str, int], sources: int) -> Drops:
    return Drops(packets["refused"], packets["beyond_limit"], packets["observed"], sources)


@lru_cache(maxsize=1024)
def _index(segment: str) -> int | None:
    """The interface's index; this process asks within a moment, so once is enough."""
    return index_of(segment)
