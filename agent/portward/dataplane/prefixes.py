"""Prefixes behind interfaces, and which keys of cached verdicts are in them. Pure.

A key is the interface index followed by the address, so a prefix behind an interface is a prefix of keys. There is
one set of such beginnings for each length. The lookup of a key takes one step for each length that occurs,
regardless of the number of prefixes. Lengths of whole bytes (/24, /48, /56, /64, host addresses) are compared as
bytes, the others as numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from portward.model import Network

_INDEX: Final = struct.Struct("=I")
_INDEX_BYTES: Final = 4


class Prefixes:
    """A collection of prefixes, each behind one interface. A whole interface is its prefix of length 0 in each
    family."""

    def __init__(self) -> None:
        # Digit of the family → length of the beginning in bytes, or number of bits after it → beginnings.
        self._bytes: dict[str, dict[int, set[bytes]]] = {"4": {}, "6": {}}
        self._shifts: dict[str, dict[int, set[int]]] = {"4": {}, "6": {}}
        self._count = 0
        self.links: set[int] = set()  # the indexes of the interfaces

    def __len__(self) -> int:
        """The number of prefixes that were added."""
        return self._count

    def add(self, link: int, network: Network) -> None:
        """Adds a prefix behind the interface with this index."""
        family, bits = ("4", 32) if network.version == 4 else ("6", 128)
        length = network.prefixlen
        number = int(network.network_address)
        self._count += 1
        self.links.add(link)
        if length % 8:
            shift = bits - length
            start = int.from_bytes(_INDEX.pack(link), "big") << length | number >> shift
            self._shifts[family].setdefault(shift, set()).add(start)
        else:
            beginning = _INDEX.pack(link) + number.to_bytes(bits // 8, "big")[: length // 8]
            self._bytes[family].setdefault(_INDEX_BYTES + length // 8, set()).add(beginning)

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
        found: set[bytes] = set()
        for length, beginnings in self._bytes[family].items():
            found.update([key for key in keys if key[:length] in beginnings])
        for shift, starts in self._shifts[family].items():
            found.update([key for key in keys if int.from_bytes(key, "big") >> shift in starts])
        return found
