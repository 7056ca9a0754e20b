"""What the kernel remembers: reading it, counting it, and making it forget.

An element is (interface index, source); its set says the class. Each is counted by the kernel and forgotten
by itself when its time is up. What must be forgotten earlier goes in two steps, in this order: `move_epoch`,
then `forget`. In one transaction a verdict stored between its walk and its commit survived 20 times of 20.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import Final, NamedTuple

from portward.errors import KernelError
from portward.gateway import mark
from portward.gateway.nfnetlink import NfNetlink
from portward.gateway.nft import Nft
from portward.gateway.ruleset import COUNTED_SETS, FAMILY_TABLE, LEARNED_SETS, RATES, TABLE, Verdict
from portward.model import Network

_INDEX = struct.Struct("=I")
# An nft command line is parsed as a whole; longer ones only take longer before the first is done.
_BATCH: Final = 2_000
_TRIES: Final = 3


class Source(NamedTuple):
    """A key of the learned sets: interface index and address (4 or 16 bytes, network order)."""

    link: int
    address: bytes

    @classmethod
    def of(cls, key: bytes) -> Source:
        """The source of a key as the kernel keeps it."""
        return cls(_INDEX.unpack_from(key)[0], key[4:])

    @property
    def family(self) -> str:
        """The digit in the name of its sets."""
        return "4" if len(self.address) == 4 else "6"

    @property
    def key(self) -> bytes:
        """The key as the kernel keeps it."""
        return _INDEX.pack(self.link) + self.address

    def __str__(self) -> str:
        # nft takes a number for an interface of that name before it takes it for an index. 16 digits are too long
        # for a name, and in quotes they stay 16.
        return f'"{self.link:016d}" . {ip_address(self.address)}'


class Element(NamedTuple):
    """A remembered verdict: packets counted since it was learned, seconds until it is forgotten. Of a source with
    a limit there are up to two: what it sent within the limit, and beyond it."""

    verdict: Verdict
    source: Source
    packets: int
    expires: float


class Learned:
    """The learned sets of the table in this network namespace."""

    def __init__(self, nft: Nft, netlink: NfNetlink) -> None:
        self._nft, self._netlink = nft, netlink

    def elements(self) -> Iterator[Element]:
        """All remembered verdicts. Raises OSError where the table is not loaded."""
        for verdict, name in COUNTED_SETS.items():
            for family in "46":
                for found in self._netlink.elements(TABLE, name + family):
                    yield Element(verdict, Source.of(found.key), found.packets, found.expires_ms / 1000)

    def held(self, source: Source) -> Element | None:
        """What the kernel remembers of a source now; None: the next packet asks a worker."""
        for verdict, name in LEARNED_SETS.items():
            found = self._netlink.element(TABLE, name + source.family, source.key)
            if found is not None:
                return Element(verdict, source, found.packets, found.expires_ms / 1000)
        return None

    def epoch(self) -> int | None:
        """The epoch under which verdicts are remembered; None: not known."""
        number = self._number("epoch")
        return None if number is None else number >> mark.EPOCH_SHIFT

    def limited(self) -> dict[int, int]:
        """Interface index → packets refused since they were over the segment's rate of misses."""
        found = self._netlink.elements(TABLE, "limited_segments")
        return {_INDEX.unpack(element.key)[0]: element.packets for element in found}

    def synced(self) -> int | None:
        """The generation of the policy table that everything remembered agrees with; None: not known."""
        return self._number("synced")

    def definitions(self) -> int | None:
        """The checksum of the definitions of the loaded sets; None: not known."""
        return self._number("definitions")

    def move_epoch(self, generation: int) -> None:
        """Step one of a change: from here on only verdicts of this generation are remembered.

        If the process dies right after it, what is remembered may be old until it expires or the agent starts
        again: `synced` still names the older generation, so the next start forgets everything.
        """
        epoch = mark.epoch_of(generation) << mark.EPOCH_SHIFT
        self._nft.elements(f"flush set {FAMILY_TABLE} epoch\nadd element {FAMILY_TABLE} epoch {{ {epoch:#x} }}")

    def forget(
        self,
        sources: Iterable[Source],
        generation: int,
        more: Callable[[list[Source]], list[str]] = lambda _: [],
    ) -> bool:
        """Step two: these sources are asked about anew, and what is still remembered agrees with `generation` of
        the policy table. It does not matter which of the sources are remembered. `more` gives what else is to be
        done, in the same transactions, for some of them. True where everything was forgotten instead.

        Each goes by `add` and then `delete` in every set of its family: a plain delete of an element that has
        expired meanwhile would fail the whole transaction. Where the kernel takes no `add`, since a set is
        full, those that are there are read and deleted; and where that fails too, since they expire meanwhile,
        everything is forgotten: that costs a burst of questions, and opens nothing.
        """
        batches = _batches(sources)
        for batch in batches:
            lines: list[str] = []
            for family in "46":
                keys = ", ".join(str(source) for source in batch if source.family == family)
                for name in LEARNED_SETS.values() if keys else ():
                    lines.append(f"add element {FAMILY_TABLE} {name}{family} {{ {keys} }}")
                    lines.append(f"delete element {FAMILY_TABLE} {name}{family} {{ {keys} }}")
            end = more(batch) + (_synced(generation) if batch is batches[-1] else [])
            try:
                self._nft.elements("\n".join(lines + end))
            except KernelError:
                if not self._forget_present(batch, end):
                    self.forget_everything(generation)
                    return True
        return False

    def _forget_present(self, sources: list[Source], end: list[str]) -> bool:
        """Deletes what is there of these sources, without an `add`; False where it could not. Since the epoch has
        moved on, what a set does not hold when it is read is not stored later under the older policy."""
        for _ in range(_TRIES):
            lines = [
                f"delete element {FAMILY_TABLE} {name}{source.family} {{ {source} }}"
                for source in sources
                for name in LEARNED_SETS.values()
                if self._netlink.element(TABLE, name + source.family, source.key) is not None
            ]
            try:
                self._nft.elements("\n".join(lines + end))
                return True
            except KernelError:  # one has expired between reading and deleting
                continue
        return False

    def forget_everything(self, generation: int) -> None:
        """Step two where everything may have changed."""
        flushes = [f"flush set {FAMILY_TABLE} {name}{family}" for name in COUNTED_SETS.values() for family in "46"]
        flushes += [f"flush map {FAMILY_TABLE} {RATES}{family}" for family in "46"]
        self._nft.elements("\n".join(flushes + _synced(generation)))

    def within(self, index: int, networks: Iterable[Network]) -> set[Source]:
        """The remembered sources behind an interface that lie in any of these prefixes."""
        wide = list(networks)
        return {
            element.source
            for element in self.elements()
            if element.source.link == index and covered(element.source, wide)
        }

    def behind(self, indexes: Iterable[int]) -> set[Source]:
        """The remembered sources behind these interfaces."""
        gone = set(indexes)
        return {element.source for element in self.elements() if element.source.link in gone}

    def _number(self, name: str) -> int | None:
        try:
            keys = [element.key for element in self._netlink.elements(TABLE, name)]
        except OSError:
            return None
        return _INDEX.unpack(keys[0])[0] if len(keys) == 1 else None


def covered(source: Source, networks: Iterable[Network]) -> bool:
    """Whether any of the networks holds the source's address."""
    address = ip_address(source.address)
    return any(address.version == network.version and address in network for network in networks)


def _synced(generation: int) -> list[str]:
    """Says, in the transaction that makes it true, that everything remembered agrees with this generation."""
    return [f"flush set {FAMILY_TABLE} synced", f"add element {FAMILY_TABLE} synced {{ {generation} }}"]


def _batches(sources: Iterable[Source]) -> list[list[Source]]:
    """At least one batch, be it empty: it carries the generation."""
    everything = list(sources)
    return [everything[start : start + _BATCH] for start in range(0, max(1, len(everything)), _BATCH)]
