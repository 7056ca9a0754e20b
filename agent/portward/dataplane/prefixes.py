"""Prefixes behind interfaces, and which keys of cached verdicts are in them. Pure.

A key is the interface index followed by the address, so a prefix behind an interface is a prefix of keys. There is
one set of such beginnings for each length. The lookup of a key takes one step for each length that occurs,
regardless of the number of prefixes. Lengths of whole bytes (/24, /48, /56, /64, host addresses) are compared as
bytes, the others as numbers.

The interfaces of a group have a number of their own, which no interface has. A prefix of the group begins with it,
and a key is also looked up with the number of its interface's group. So the cost does not grow with the number of
interfaces either.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from portward.model import Network

_INDEX: Final = struct.Struct("=I")
_INDEX_BYTES: Final = 4
# The kernel's indexes are positive numbers of 31 bits, so this and all above it is free for groups.
_FIRST_GROUP: Final = 1 << 31


class Prefixes:
    """A collection of prefixes, each behind one interface. A whole interface is its prefix of length 0 in each
    family."""

    def __init__(self) -> None:
        # Digit of the family → length of the beginning in bytes, or number of bits after it → beginnings.
        self._bytes: dict[str, dict[int, set[bytes]]] = {"4": {}, "6": {}}
        self._shifts: dict[str, dict[int, set[int]]] = {"4": {}, "6": {}}
        self._count = 0
        self.links: set[int] = set()  # the indexes of the interfaces
        # The interfaces of a group → its number; the index of each in a key → the number in a key.
        self._groups: dict[tuple[int, ...], int] = {}
        self._group_of: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        """The number of prefixes that were added."""
        return self._count

    def add(self, links: Sequence[int], network: Network) -> None:
        """Adds a prefix behind an interface, or behind each interface of a group. `links` are their indexes; no
        interface may be in two groups."""
        family, bits = ("4", 32) if network.version == 4 else ("6", 128)
        length = network.prefixlen
        number = int(network.network_address)
        self._count += 1
        link = self._number(links)
        if length % 8:
            shift = bits - length
            start = int.from_bytes(_INDEX.pack(link), "big") << length | number >> shift
            self._shifts[family].setdefault(shift, set()).add(start)
        else:
            beginning = _INDEX.pack(link) + number.to_bytes(bits // 8, "big")[: length // 8]
            self._bytes[family].setdefault(_INDEX_BYTES + length // 8, set()).add(beginning)

    def _number(self, links: Sequence[int]) -> int:
        """The number with which the beginnings behind these interfaces start."""
        if len(links) == 1:
            self.links.add(links[0])
            return links[0]
        group = tuple(links)
        number = self._groups.get(group)
        if number is None:
            number = self._groups[group] = _FIRST_GROUP + len(self._groups)
            self.links.update(group)
            self._group_of.update((_INDEX.pack(link), _INDEX.pack(number)) for link in group)
        return number

    def add_link(self, link: int) -> None:
        """Adds all addresses of both families behind an interface."""
        self._count += 1
        self.links.add(link)
        for lengths in self._bytes.values():
            lengths.setdefault(_INDEX_BYTES, set()).add(_INDEX.pack(link))

    def add_source(self, key: bytes) -> None:
        """Adds one address behind an interface, given as a key in the kernel's form."""
        self._count += 1
        self.links.add(_INDEX.unpack_from(key)[0])
        self._bytes["4" if len(key) == _INDEX_BYTES + 4 else "6"].setdefault(len(key), set()).add(key)

    def families(self) -> str:
        """The digits of the families that have any prefix: `4`, `6` or `46`."""
        return "".join(family for family in "46" if self._bytes[family] or self._shifts[family])

    def among(self, family: str, keys: Iterable[bytes]) -> set[bytes]:
        """The keys that are in any of the prefixes. All keys are of this family."""
        keys = keys if isinstance(keys, list) else list(keys)
        found = self._beginning(family, keys)
        if self._groups:
            by_group: dict[bytes, list[bytes]] = {}
            for key in keys:
                if (group := self._group_of.get(key[:_INDEX_BYTES])) is not None:
                    by_group.setdefault(group + key[_INDEX_BYTES:], []).append(key)
            for shared in self._beginning(family, list(by_group)):
                found.update(by_group[shared])
        return found

    def _beginning(self, family: str, keys: list[bytes]) -> set[bytes]:
        """The keys that have one of the beginnings."""
        found: set[bytes] = set()
        for length, beginnings in self._bytes[family].items():
            found.update([key for key in keys if key[:length] in beginnings])
        for shift, starts in self._shifts[family].items():
            found.update([key for key in keys if int.from_bytes(key, "big") >> shift in starts])
        return found
