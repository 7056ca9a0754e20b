"""Recent drops of the kernel by machine: the counters of the cached verdicts, which live a minute or
so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from msgspec.structs import replace

from portward.dataplane.names import LIMITED_SETS, TABLE, VERDICT_SETS, KernelTable, LimitResult
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.verdict_cache import Source
from portward.errors import PortwardError
from portward.ipc.mark import Class
from portward.model import Address, Network
from portward.ops.diagnosis.facts import Drops, Kernel, Machine

# Name of a set → the field of `Drops` that its elements count.
_FIELDS: Final = {
    VERDICT_SETS[Class.DENY]: "refused",
    VERDICT_SETS[Class.REFUSED]: "refused",
    LIMITED_SETS[LimitResult.OVER]: "beyond_limit",
    VERDICT_SETS[Class.OBSERVED]: "observed",
}
_UNKNOWN: Final = VERDICT_SETS[Class.UNKNOWN]

# (segment, address) → the prefix of the attachment that covers the source.
Owner = Callable[[str, Address], Network | None]
# The field of `Drops`, a source, and its packets.
_Element = tuple[str, Source, int]
# Segment → the indexes of its interfaces here.
Indexes = Callable[[str], tuple[int, ...]]


def with_drops(machines: Sequence[Machine], owner: Owner, indexes: Indexes) -> tuple[tuple[Machine, ...], Kernel]:
    """The machines with what the kernel dropped of each, and whether the kernel's counters are known.

    `owner` returns the prefix that covers a source, because a more specific prefix may belong to another
    subscription.
    """
    try:
        netlink = NfNetlink()
    except PortwardError:
        return tuple(machines), Kernel.NOT_PERMITTED
    try:
        if not (loaded := _loaded(netlink)):
            return tuple(machines), Kernel.NO_RULESET
        reading = _Reading(loaded, owner, indexes)
        found = tuple(replace(machine, drops=reading.of(machine)) for machine in machines)
    except OSError:
        return tuple(machines), Kernel.NOT_PERMITTED
    finally:
        netlink.close()
    known = not found or any(machine.drops is not None for machine in found)
    return found, Kernel.ASKED if known else Kernel.NO_INTERFACE


def of_unknown_subscription(indexes: Sequence[int], address: Address) -> tuple[Drops | None, Kernel]:
    """The cached verdict for a source of an unknown subscription. `indexes` are the interfaces of its segment."""
    if not indexes:
        return None, Kernel.NO_INTERFACE
    try:
        netlink = NfNetlink()
    except PortwardError:
        return None, Kernel.NOT_PERMITTED
    try:
        if not (loaded := _loaded(netlink)):
            return None, Kernel.NO_RULESET
        sources = [Source(index, address.packed) for index in indexes]
        held = any(one.element(TABLE, _UNKNOWN + each.family, each.key) for one in loaded for each in sources)
    except OSError:
        return None, Kernel.NOT_PERMITTED
    finally:
        netlink.close()
    return Drops(nobody=held), Kernel.ASKED


def _loaded(netlink: NfNetlink) -> list[NfNetlink]:
    """The kernel's tables of portward that are loaded, each for itself. Raises OSError."""
    return [one for table in KernelTable if (one := netlink.of(table)).sets(TABLE)]


class _Reading:
    """One reading of the sets: single elements for addresses, and all elements once for prefixes and groups."""

    def __init__(self, loaded: Sequence[NfNetlink], owner: Owner, indexes: Indexes) -> None:
        self._loaded, self._owner, self._indexes = loaded, owner, indexes
        self._all = lru_cache(maxsize=None)(self._elements)
        self._of_address = lru_cache(maxsize=None)(self._by_address)

    def of(self, machine: Machine) -> Drops | None:
        """The recent drops of a machine; None if its segment has no interface here."""
        indexes = self._indexes(machine.segment)
        if not indexes:
            return None
        network = machine.address
        if network.prefixlen != network.max_prefixlen:
            return self._sum(self._all(network.version), indexes, machine)
        address = network.network_address.packed
        if len(indexes) == 1:
            return self._of_source(Source(indexes[0], address))
        return self._sum(self._of_address(network.version).get(address, []), indexes, machine)

    def _of_source(self, source: Source) -> Drops:
        packets = dict.fromkeys(_FIELDS.values(), 0)
        for one in self._loaded:
            for name, field in _FIELDS.items():
                found = one.element(TABLE, name + source.family, source.key)
                packets[field] += 0 if found is None else found.packets
        return _drops(packets, int(any(packets.values())))

    def _sum(self, elements: list[_Element], indexes: Sequence[int], machine: Machine) -> Drops:
        """The counts of those of these elements that are of the machine, behind these interfaces."""
        packets, here = dict.fromkeys(_FIELDS.values(), 0), frozenset(indexes)
        sources = set()
        for field, source, number in elements:
            if source.link not in here:
                continue
            address = ip_address(source.address)
            if address in machine.address and self._owner(machine.segment, address) == machine.address:
                packets[field] += number
                sources.add(address)
        return _drops(packets, len(sources))

    def _by_address(self, version: int) -> dict[bytes, list[_Element]]:
        found: dict[bytes, list[_Element]] = {}
        for element in self._all(version):
            found.setdefault(element[1].address, []).append(element)
        return found

    def _elements(self, version: int) -> list[_Element]:
        return [
            (field, Source.of(element.key), element.packets)
            for one in self._loaded
            for name, field in _FIELDS.items()
            for element in one.elements(TABLE, f"{name}{version}")
        ]


def _drops(packets: dict[str, int], sources: int) -> Drops:
    return Drops(packets["refused"], packets["beyond_limit"], packets["observed"], sources)
