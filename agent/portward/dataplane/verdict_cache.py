"""The verdicts that the kernel has cached: reads them, adds them, and deletes them. Pure, over `Elements`.

A cached verdict is an element (interface index, source address) of the set of its verdict. The kernel counts the
packets of each and lets each expire. A change of policy deletes cached verdicts in two steps, in this order:
`move_epoch`, then `forget`, `forget_within` or `forget_everything`. One transaction for both is not enough: a
verdict that a packet stored between the kernel's walk of the set and its commit survived in 20 of 20 tries.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from itertools import product
from typing import Final, NamedTuple

from portward.dataplane.elements import Add, Change, Delete, Elements, Flush, RefusedError
from portward.dataplane.gate import MIN_GATED_ELEMENTS, Gate
from portward.dataplane.interface_sets import InterfaceSets, renewed
from portward.dataplane.names import (
    COMING_EPOCHS,
    COUNTED_SETS,
    ENFORCED,
    EPOCH,
    GATED,
    MISS_LIMITED_SEGMENTS,
    RATE_LIMITS,
    RECENT_EPOCHS,
    SYNCED,
    VERDICT_SETS,
    Verdict,
)
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.setdump import SetRow
from portward.ipc import mark

# An interface index or a mark, in the byte order of the host.
_NUMBER: Final = struct.Struct("=I")
# An element can expire between its reading and its deletion, which fails the transaction: then both are repeated.
_FORGET_TRIES: Final = 3
# Up to this many sources are read one by one if a set is full; each takes one message for each set.
_MAX_READ_ONE_BY_ONE: Final = 500

# A reading of this many elements or fewer fits into one message, and is a snapshot.
_SNAPSHOT_ELEMENTS: Final = 32
# After this many readings of one set the set is flushed instead.
_MAX_READINGS: Final = 5
# The kernel collects expired elements once a second, and its timer may be a little early.
_COLLECTION_INTERVAL_S: Final = 0.9
# An element that expires sooner than this may be gone before it is deleted: a large deletion can wait for seconds.
_EXPIRING_MS: Final = 5_000
# For each message of a reading the kernel walks the set from its beginning, so the time grows with the square of
# the size (25,000 elements 25 ms, 100,000 0.4 s, 250,000 2 s). A larger set is flushed unread.
_MAX_READ_ELEMENTS: Final = 100_000
# A change of this many prefixes is a batch and therefore rare. It flushes smaller sets too, so that it is enforced
# within 0.1 s.
_MANY_PREFIXES: Final = 256
_MAX_READ_ELEMENTS_FOR_MANY: Final = 32_768
# A set of this size is flushed if nine tenths of it must go, because that saves the second reading.
_MIN_FLUSHED_ELEMENTS: Final = 4_096

_PASSING_SETS: Final = tuple(name for verdict, name in VERDICT_SETS.items() if verdict in mark.PASSING)
_STOPPING_SETS: Final = tuple(name for verdict, name in VERDICT_SETS.items() if verdict not in mark.PASSING)
_VERDICTS: Final = {name: verdict for verdict, name in COUNTED_SETS.items()}


class Source(NamedTuple):
    """A key of a verdict set: interface index and address (4 or 16 bytes, network order)."""

    link: int
    address: bytes

    @classmethod
    def of(cls, key: bytes) -> Source:
        """The source of a key in the kernel's form."""
        return cls(_NUMBER.unpack_from(key)[0], key[_NUMBER.size :])

    @property
    def family(self) -> str:
        """The digit of its address family in the names of sets: 4 or 6."""
        return "4" if len(self.address) == 4 else "6"

    @property
    def key(self) -> bytes:
        """The key in the kernel's form: the index in the byte order of the host, then the address."""
        return _NUMBER.pack(self.link) + self.address

    def __str__(self) -> str:
        return f"{self.link} . {ip_address(self.address)}"


class Element(NamedTuple):
    """A cached verdict: the packets counted since it was cached, and the seconds until it expires. A source with a
    rate limit has up to two: packets within the limit, and packets over it."""

    verdict: Verdict
    source: Source
    packets: int
    expires: float


class VerdictCache:
    """The cached verdicts of one network namespace. Methods that change them raise RefusedError (a KernelError),
    and methods that read them raise OSError."""

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        self._gate = Gate(elements)
        self.interfaces = InterfaceSets(elements)
        # Set → number of elements at the last reading. Another thread may write newer figures.
        self.sizes: dict[str, int] = {}

    def elements(self) -> Iterator[Element]:
        """All cached verdicts, each as it was at some moment during the reading. A few may be missing or appear
        twice. Raises OSError if the table is not loaded."""
        for verdict, name in COUNTED_SETS.items():
            for family in "46":
                for row in self._rows(name + family):
                    yield _element(verdict, row)

    def get(self, source: Source) -> Element | None:
        """The cached verdict of a source; None if there is none, so that the next packet asks a worker."""
        for verdict, name in VERDICT_SETS.items():
            found = self._elements.element(name + source.family, source.key)
            if found is not None:
                return Element(verdict, source, found.packets, found.expires_ms / 1000)
        return None

    def epoch(self) -> int | None:
        """The epoch under which verdicts are cached; None if it cannot be read."""
        number = self._number(EPOCH)
        return None if number is None else number >> mark.EPOCH_SHIFT

    def over_miss_limit(self) -> dict[int, int]:
        """Interface index → packets that were dropped because the segment was over its miss limit."""
        return {_NUMBER.unpack(key)[0]: packets for key, packets, _ in self._elements.rows(MISS_LIMITED_SEGMENTS)}

    def synced(self) -> int | None:
        """The generation of the policy table that all cached verdicts agree with; None if it cannot be read."""
        return self._number(SYNCED)

    def enforces(self, generation: int) -> bool:
        """Whether no cached verdict of an older generation of the policy table has any effect: none is left, or
        all that are left are behind the gate."""
        # ENFORCED first: the transaction that removes the gate writes SYNCED, so one of the two readings sees it.
        return generation in (self._number(ENFORCED), self.synced())

    def definitions(self) -> int | None:
        """The checksum of the definitions of the loaded sets; None if it cannot be read."""
        return self._number("definitions")

    def move_epoch(self, generation: int, links: Iterable[int] = ()) -> None:
        """*Move the epoch*: from now on only verdicts of this generation are cached. `links` as for
        `InterfaceSets.renew`.

        If the process dies right after it, cached verdicts may be old until they expire or the agent starts again.
        SYNCED still has the older generation, so the next start forgets everything.
        """
        epoch, before = mark.epoch_of(generation), self.epoch()
        changes: list[Change] = [Flush(EPOCH), Add(EPOCH, _marks([epoch]))]
        if (
            before is not None
        ):  # workers may still send verdicts of it: they count for one packet, and are not cached
            changes.append(Add(RECENT_EPOCHS, _marks([before])))
        self._elements.commit([*changes, *_coming(before, epoch), *renewed(links)])

    def add(self, verdicts: Mapping[Source, mark.Class]) -> None:
        """Caches these verdicts, as packets with a verdict mark do. Raises KernelError, and then none is cached.
        Only the kernel thread may call it, with verdicts of the generation that the kernel enforces."""
        keys: dict[str, list[bytes]] = {}
        for source, verdict in verdicts.items():
            keys.setdefault(VERDICT_SETS[verdict] + source.family, []).append(source.key)
        self._elements.commit([Add(set_, found) for set_, found in keys.items()])

    def forget(self, sources: Iterable[Source], generation: int, more: Sequence[Change] = ()) -> None:
        """*Delete* for single sources: deletes their cached verdicts, if there are any, and records that all
        others agree with `generation` of the policy table. `more` are changes for the same transaction.

        Each source is added to every set of its family and then deleted, because the `Delete` of an element that
        has expired would fail the whole transaction. If the kernel refuses the `Add` because a set is full, the
        elements that exist are read and deleted.
        """
        wanted = list(sources)
        end = [*more, *_synced(generation)]
        changes: list[Change] = []
        for family in "46":
            keys = [source.key for source in wanted if source.family == family]
            for name in VERDICT_SETS.values() if keys else ():
                changes += [Add(name + family, keys), Delete(name + family, keys)]
        try:
            self._elements.commit([*changes, *end])
        except RefusedError:
            if len(wanted) > _MAX_READ_ONE_BY_ONE or not self._forget_present(wanted, end):
                self.forget_within(_hosts(wanted), generation, more)

    def _forget_present(self, sources: list[Source], end: list[Change]) -> bool:
        """Deletes the cached verdicts of these sources without an `Add`; False if it could not. A verdict that is
        not in a set when the set is read is not stored there later, because the epoch has moved on."""
        for _ in range(_FORGET_TRIES):
            changes: list[Change] = [
                Delete(name + source.family, [source.key])
                for source in sources
                for name in VERDICT_SETS.values()
                if self._elements.element(name + source.family, source.key) is not None
            ]
            try:
                self._elements.commit([*changes, *end])
                return True
            except RefusedError:  # one has expired between its reading and its deletion
                continue
        return False

    def forget_within(
        self,
        prefixes: Prefixes,
        generation: int,
        first: Sequence[Change] = (),
        *,
        opens: bool = True,
        closes: bool = True,
    ) -> set[Source]:
        """*Delete* for prefixes: the same as `forget` for all sources in them, at a cost that does not grow with
        the number of prefixes. Returns the sources found in sets that let packets pass.

        `first` are changes that are made before all others. `opens`: the change may let packets pass, so cached
        verdicts that stop packets may be wrong too. `closes`: the change may stop packets, so the gate shuts the
        interfaces during a long search.

        The sets that let packets pass come first, and are read until a reading finds nothing to delete. The sets
        that stop packets follow, before SYNCED is written if they may be wrong, else after it. A set is flushed if
        it cannot be read reliably, or if nearly all of it would go. A flush costs each other source in the set
        one question, and opens nothing.
        """
        families = prefixes.families()
        passing, stopping = product(_PASSING_SETS, families), list(product(_STOPPING_SETS, families))
        gated = closes and self._passing_elements(families) > MIN_GATED_ELEMENTS
        if gated:
            self._gate.shut(prefixes.links, None if opens else generation, first)
        elif first:
            self._elements.commit(first)
        sweep = _Sweep(self._elements, self.sizes, prefixes)
        for name, family in passing:
            sweep.clear(name, family)
        found = {Source.of(key) for keys in sweep.found.values() for key in keys}
        if opens:
            for name, family in stopping:
                sweep.clear(name, family)
        self._elements.commit([*(self._gate.lifted() if gated else ()), *_synced(generation)])
        if not opens:
            for name, family in stopping:
                sweep.clear(name, family)
        return found

    def delete_expiring(self, due: Mapping[str, Sequence[bytes]]) -> None:
        """Deletes elements (set → keys) that are about to expire, so that the kernel reports what they have
        counted. Raises KernelError if a set is full, and then none is deleted."""
        # Added first for the reason in `forget`: one may have expired by now.
        changes: list[Change] = []
        for set_, keys in due.items():
            changes += [Add(set_, keys), Delete(set_, keys)]
        self._elements.commit(changes)

    def flush(self, sets: Iterable[str]) -> None:
        """Deletes all elements of these sets. Raises KernelError."""
        self._elements.commit([Flush(set_) for set_ in sets])

    def forget_behind_gate(self) -> None:
        """If a gate is shut, forgets every verdict that lets packets pass, because the reload that follows removes
        the gate, and no revoked source may pass then. Does nothing if the table is not loaded. Raises OSError or
        KernelError."""
        try:
            gated = self._elements.rows(GATED)
        except FileNotFoundError:
            return
        if gated:
            self._elements.commit([Flush(name + family) for name, family in product(_PASSING_SETS, "46")])

    def _passing_elements(self, families: str) -> int:
        """The number of elements, at the last reading, in the sets that let packets pass."""
        return sum(self.sizes.get(name + family, 0) for name, family in product(_PASSING_SETS, families))

    def forget_everything(self, generation: int) -> None:
        """*Delete* if everything may have changed: removes all cached verdicts and all sources of rate limits."""
        flushes = [Flush(name + family) for name in (*COUNTED_SETS.values(), RATE_LIMITS) for family in "46"]
        self._elements.commit([*flushes, *_synced(generation)])

    def _rows(self, set_: str) -> list[SetRow]:
        rows = self._elements.rows(set_)
        self.sizes[set_] = len(rows)
        return rows

    def _number(self, name: str) -> int | None:
        """The only element of a set; None if there is not exactly one, or if it cannot be read."""
        try:
            keys = [key for key, _, _ in self._elements.rows(name)]
        except OSError:
            return None
        return _NUMBER.unpack(keys[0])[0] if len(keys) == 1 else None


class _Sweep:
    """Deletes all cached verdicts of some prefixes, set by set. `found` are the keys that were in the prefixes so
    far, by set.

    A reading of a larger set can miss elements (see `elements`), because the kernel collects expired elements or
    resizes the set meanwhile. So a set is clear only after a reading that found nothing to delete, that showed no
    element twice, and that began so soon after another one that the kernel's collection cannot have disturbed
    both."""

    def __init__(self, elements: Elements, sizes: dict[str, int], prefixes: Prefixes) -> None:
        """`sizes` is set → number of elements at the last reading. The sweep writes newer figures into it."""
        self._elements, self._sizes, self._prefixes = elements, sizes, prefixes
        self._max_read = _MAX_READ_ELEMENTS if len(prefixes) < _MANY_PREFIXES else _MAX_READ_ELEMENTS_FOR_MANY
        self._began: dict[str, float] = {}
        self.found: dict[str, set[bytes]] = {}

    def clear(self, name: str, family: str) -> None:
        """Deletes the elements that are in the prefixes from a set. `name` is the set's name without the digit
        `family`. Raises OSError, and KernelError if the kernel refuses even to flush the set."""
        set_ = name + family
        for _ in range(_MAX_READINGS):
            # Checked after each reading, because the size may be unknown before the first one.
            if self._sizes.get(set_, 0) > self._max_read:
                break
            before = self._began.get(set_)
            rows, deletions = self._read(set_, family)
            if deletions == [Flush(set_)]:
                break
            if deletions:
                # Refused if an element has expired, or if the set is full: the next reading shows it.
                with contextlib.suppress(RefusedError):
                    self._elements.commit(deletions)
            elif len(rows) <= _SNAPSHOT_ELEMENTS or (self._soon_after(before) and _each_once(rows)):
                return
        self._elements.commit([Flush(set_)])
        self._sizes[set_] = 0

    def _soon_after(self, before: float | None) -> bool:
        """Whether the kernel can have collected at most once since a reading that began at `before`."""
        return before is not None and self._elements.now() - before < _COLLECTION_INTERVAL_S

    def _read(self, set_: str, family: str) -> tuple[list[SetRow], list[Change]]:
        """A reading of a set, and the changes that delete its elements in the prefixes."""
        self._began[set_] = self._elements.now()
        rows = self._elements.rows(set_)
        self._sizes[set_] = len(rows)
        found = self._prefixes.among(family, [key for key, _, _ in rows])
        if not found:
            return rows, []
        before = self.found.setdefault(set_, set())
        going = [row for row in rows if row[0] in found]
        before |= found
        if len(found) >= _MIN_FLUSHED_ELEMENTS and 10 * len(found) >= 9 * len(rows):
            return rows, [Flush(set_)]
        return rows, _deletions(set_, going)


def _deletions(set_: str, rows: list[SetRow]) -> list[Change]:
    """The changes that delete these elements. An element that may expire before its deletion is added first, so
    that the deletion succeeds in any case. Adding all of them would take three times as long."""
    soon = list({key for key, _, expires_ms in rows if 0 < expires_ms < _EXPIRING_MS})
    rest = list({key for key, _, expires_ms in rows} - set(soon))
    changes: list[Change] = [Add(set_, soon), Delete(set_, soon)] if soon else []
    return [*changes, Delete(set_, rest)] if rest else changes


def _each_once(rows: list[SetRow]) -> bool:
    return len({key for key, _, _ in rows}) == len(rows)


def element_of(set_: str, row: SetRow) -> Element:
    """The cached verdict in a row of this set."""
    return _element(_VERDICTS[set_[:-1]], row)


def _element(verdict: Verdict, row: SetRow) -> Element:
    key, packets, expires_ms = row
    return Element(verdict, Source.of(key), packets, expires_ms / 1000)


def _hosts(sources: Iterable[Source]) -> Prefixes:
    prefixes = Prefixes()
    for source in sources:
        prefixes.add_source(source.key)
    return prefixes


def _coming(before: int | None, epoch: int) -> list[Change]:
    """Moves COMING_EPOCHS from one epoch to another. A worker may find a verdict in the table some milliseconds
    before the kernel's epoch moves, and that verdict counts for its packet."""
    steps = mark.AHEAD + 1 if before is None else (epoch - before) % mark.EPOCHS
    if steps > mark.AHEAD:
        return [Flush(COMING_EPOCHS), Add(COMING_EPOCHS, _marks(mark.coming(epoch)))]
    if not steps or before is None:
        return []
    gone = _marks(mark.coming(before, steps))
    new = _marks(mark.coming((before + mark.AHEAD) % mark.EPOCHS, steps))
    # Added before the deletion, which would be refused if another program has removed one of them.
    return [Add(COMING_EPOCHS, [*gone, *new]), Delete(COMING_EPOCHS, gone)]


def _marks(epochs: Iterable[int]) -> list[bytes]:
    return [_NUMBER.pack(epoch << mark.EPOCH_SHIFT) for epoch in epochs]


def _synced(generation: int) -> list[Change]:
    """Records that all cached verdicts agree with this generation. It belongs into the transaction that makes this
    true."""
    return [Flush(SYNCED), Add(SYNCED, [_NUMBER.pack(generation)])]
