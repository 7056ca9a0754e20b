"""Recent drops of the kernel by machine: the counters of the cached verdicts, which live a minute or
so."""

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


def with_drops(machines: Sequence[Machine], owner: Owner) -> tuple[tuple[Machine, ...], Kernel]:
    """The machines with what the kernel dropped of each, and whether the kernel's counters are known.

    `owner` returns the prefix that covers a source, because a more specific prefix may belong to another
    subscription.
    """
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


def of_unknown_subscription(segment: str, address: Address) -> tuple[Drops | None, Kernel]:
    """The cached verdict for a source of an unknown subscription."""
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
    """One reading of the sets: single elements for addresses, and all elements once for prefixes."""

    def __init__(self, netlink: NfNetlink, owner: Owner) -> None:
        self._netlink, self._owner = netlink, owner
        self._all = lru_cache(maxsize=None)(self._elements)

    def of(self, machine: Machine) -> Drops | None:
        """The recent drops of a machine; None if its segment is not an interface here."""
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
    """The index of the interface. It is read once, because the process lives only for a moment."""
    return index_of(segment)
