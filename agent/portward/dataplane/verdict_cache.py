"""The verdicts that the kernel has cached: reading them, counting them, and making it forget them.

An element is (interface index, source); its set says the verdict. Each is counted by the kernel and expires by
itself. What must be forgotten earlier goes in two steps, in this order: `move_epoch`, then `forget` or
`forget_within`. In one transaction a verdict stored between its walk and its commit survived 20 times of 20.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from errno import ENOENT
from ipaddress import ip_address
from itertools import product
from typing import Final, NamedTuple

from portward.dataplane.elements import Add, Change, Delete, Elements, Flush, RefusedError
from portward.dataplane.gate import WORTH_A_GATE, Gate
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.ruleset import (
    COUNTED_SETS,
    ENFORCED,
    GATED,
    KNOWN_INTERFACES,
    RATE_LIMITS,
    RENEWED,
    UNSETTLED,
    VERDICT_SETS,
    Verdict,
)
from portward.dataplane.setdump import SetRow
from portward.dataplane.sweep import Sweep
from portward.ipc import mark

_INDEX = struct.Struct("=I")
_TRIES: Final = 3
# Up to this many sources are looked for one by one in full sets; each takes a message for each set.
_ONE_BY_ONE: Final = 500

_PASSING_SETS: Final = tuple(name for verdict, name in VERDICT_SETS.items() if verdict in mark.PASSING)
_STOPPING_SETS: Final = tuple(name for verdict, name in VERDICT_SETS.items() if verdict not in mark.PASSING)
_VERDICTS: Final = {name: verdict for verdict, name in COUNTED_SETS.items()}


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
        return f"{self.link} . {ip_address(self.address)}"


class Element(NamedTuple):
    """A cached verdict: packets counted since it was learned, seconds until it expires. Of a source with a limit
    there are up to two: what it sent within the limit, and beyond it."""

    verdict: Verdict
    source: Source
    packets: int
    expires: float


class VerdictCache:
    """The cached verdicts of the table in this network namespace. Whatever changes them raises KernelError (a
    RefusedError), whatever reads them OSError."""

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        self._gate = Gate(elements)
        # Set → elements at the last reading. Another thread may bring newer figures in.
        self.sizes: dict[str, int] = {}

    def elements(self) -> Iterator[Element]:
        """All cached verdicts, each as it was within the time that the reading takes; a few may be missing or be
        there twice. Raises OSError if the table is not loaded."""
        for verdict, name in COUNTED_SETS.items():
            for family in "46":
                for row in self._rows(name + family):
                    yield _element(verdict, row)

    def get(self, source: Source) -> Element | None:
        """The cached verdict of a source now; None: the next packet asks a worker."""
        for verdict, name in VERDICT_SETS.items():
            found = self._elements.element(name + source.family, source.key)
            if found is not None:
                return Element(verdict, source, found.packets, found.expires_ms / 1000)
        return None

    def epoch(self) -> int | None:
        """The epoch under which verdicts are cached; None: not known."""
        number = self._number("epoch")
        return None if number is None else number >> mark.EPOCH_SHIFT

    def over_miss_limit(self) -> dict[int, int]:
        """Interface index → packets refused since they were over the segment's rate of misses."""
        return {_INDEX.unpack(key)[0]: packets for key, packets, _ in self._elements.rows("limited_segments")}

    def synced(self) -> int | None:
        """The generation of the policy table that everything cached agrees with; None: not known."""
        return self._number("synced")

    def enforces(self, generation: int) -> bool:
        """Whether no cached verdict of an older generation of the policy table has any effect: none is left, or
        those that are left are behind the gate."""
        # The gate's first: if it goes between the two readings, `synced` is written with that.
        return generation in (self._number(ENFORCED), self.synced())

    def definitions(self) -> int | None:
        """The checksum of the definitions of the loaded sets; None: not known."""
        return self._number("definitions")

    def move_epoch(self, generation: int, links: Iterable[int] = ()) -> None:
        """Step one of a change: from here on only verdicts of this generation are cached; `links` as for `renew`.

        If the process dies right after it, what is cached may be old until it expires or the agent starts again:
        `synced` still names the older generation, so the next start forgets everything.
        """
        epoch, before = mark.epoch_of(generation), self.epoch()
        changes: list[Change] = [Flush("epoch"), Add("epoch", _marks([epoch]))]
        if before is not None:  # its verdicts may still be on their way: `learn` acts on them once
            changes.append(Add("recent", _marks([before])))
        self._elements.commit([*changes, *_coming(before, epoch), *_renewed(links)])

    def renew(self, links: Iterable[int]) -> None:
        """The owners of these interfaces have changed. For ten seconds from here on no verdict on their packets
        counts that was found under an older epoch, or for the forward guard. Raises KernelError."""
        self._elements.commit(_renewed(links))

    def add(self, verdicts: Mapping[Source, mark.Class]) -> None:
        """Caches these verdicts, as if packets had brought them; raises KernelError, and then none is cached. Only
        the kernel thread may call it, with verdicts of the policy that the kernel stands at."""
        keys: dict[str, list[bytes]] = {}
        for source, verdict in verdicts.items():
            keys.setdefault(VERDICT_SETS[verdict] + source.family, []).append(source.key)
        self._elements.commit([Add(set_, found) for set_, found in keys.items()])

    def forget(self, sources: Iterable[Source], generation: int, more: Sequence[Change] = ()) -> None:
        """Step two for single sources: they are asked about anew, and what is still cached agrees with
        `generation` of the policy table. It does not matter which of the sources are cached. `more` is done in the
        same transaction.

        Each goes by `Add` and then `Delete` in every set of its family: a plain `Delete` of an element that has
        expired meanwhile would fail the whole transaction. If the kernel does not take the `Add`, since a set is
        full, those that are there are read and deleted.
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
            if len(wanted) > _ONE_BY_ONE or not self._forget_present(wanted, end):
                self.forget_within(_hosts(wanted), generation, more)

    def _forget_present(self, sources: list[Source], end: list[Change]) -> bool:
        """Deletes what is there of these sources, without an `Add`; False if it could not. Since the epoch has
        moved on, what a set does not hold when it is read is not stored later under the older policy."""
        for _ in range(_TRIES):
            changes: list[Change] = [
                Delete(name + source.family, [source.key])
                for source in sources
                for name in VERDICT_SETS.values()
                if self._elements.element(name + source.family, source.key) is not None
            ]
            try:
                self._elements.commit([*changes, *end])
                return True
            except RefusedError:  # one has expired between reading and deleting
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
        """Step two for prefixes: the same as `forget` for all sources that lie in them, at a cost that does not
        grow with the number of prefixes. Gives the sources found in sets that let packets pass.

        `first` is done before everything else. `opens`: the change may let packets pass, so verdicts that stop
        them may be wrong, too. `closes`: it may stop packets, so the gate stands before the interfaces meanwhile
        if there is much to read.

        The sets that let packets pass come first, and are read until a reading finds nothing to delete. The others
        follow: before `synced` is written if they may be wrong, else after it. A set that cannot be read well, or
        of which nearly everything would go, is flushed: that costs others a question each, and opens nothing.
        """
        families = prefixes.families()
        passing, stopping = product(_PASSING_SETS, families), list(product(_STOPPING_SETS, families))
        gated = closes and self._reads(families) > WORTH_A_GATE
        if gated:
            self._gate.shut(prefixes.links, None if opens else generation, first)
        elif first:
            self._elements.commit(first)

        sweep = Sweep(self._elements, self.sizes, prefixes)
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
        """Deletes elements (set → keys) that are about to expire, so that all that they have counted is known.
        Raises KernelError, and then none is deleted: a set is full."""
        # As in `forget`: one may have expired by now.
        changes: list[Change] = []
        for set_, keys in due.items():
            changes += [Add(set_, keys), Delete(set_, keys)]
        self._elements.commit(changes)

    def flush(self, sets: Iterable[str]) -> None:
        """Deletes all elements of these sets, which are about to be made anew; raises KernelError."""
        self._elements.commit([Flush(set_) for set_ in sets])

    def forget_behind_gate(self) -> None:
        """If a gate stands, forgets every verdict that lets packets pass, so that a reload, which removes it,
        lets no revoked source pass. Does nothing if the table is not loaded. Raises OSError or KernelError."""
        try:
            gated = self._elements.rows(GATED)
        except FileNotFoundError:
            return
        if gated:
            self._elements.commit([Flush(name + family) for name, family in product(_PASSING_SETS, "46")])

    def _reads(self, families: str) -> int:
        """How many elements there were, at the last reading, in the sets that let packets pass."""
        return sum(self.sizes.get(name + family, 0) for name, family in product(_PASSING_SETS, families))

    def forget_everything(self, generation: int) -> None:
        """Step two if everything may have changed."""
        flushes = [Flush(name + family) for name in (*COUNTED_SETS.values(), RATE_LIMITS) for family in "46"]
        self._elements.commit([*flushes, *_synced(generation)])

    def _rows(self, set_: str) -> list[SetRow]:
        rows = self._elements.rows(set_)
        self.sizes[set_] = len(rows)
        return rows

    def unsettle(self, indexes: Iterable[int]) -> None:
        """From here on nothing from these interfaces is asked about or learned, but dropped, also what waits for
        a worker now; raises KernelError."""
        indexes = list(indexes)
        unsettled = Add(UNSETTLED, [_INDEX.pack(index) for index in indexes])
        self._elements.commit([unsettled, *_renewed(indexes)])

    def settle(self, indexes: Iterable[int]) -> None:
        """Ends `unsettle` for these interfaces; raises KernelError."""
        self._elements.commit([Delete(UNSETTLED, [_INDEX.pack(index) for index in indexes])])

    def set_known_interfaces(self, indexes: frozenset[int]) -> bool:
        """Brings the set of known interfaces to these indexes; False if that was all it held. Raises KernelError,
        also without the set."""
        had = self._known_interfaces()
        if had == indexes:
            return False
        gone, new = ([_INDEX.pack(index) for index in sorted(part)] for part in (had - indexes, indexes - had))
        self._elements.commit([Delete(KNOWN_INTERFACES, gone), Add(KNOWN_INTERFACES, new)])
        return True

    def retain_known_interfaces(self, indexes: frozenset[int]) -> None:
        """Takes out of the set of known interfaces all but these; raises KernelError, also without the set."""
        self.set_known_interfaces(self._known_interfaces() & indexes)

    def _known_interfaces(self) -> frozenset[int]:
        try:
            return frozenset(_INDEX.unpack(key)[0] for key, _, _ in self._elements.rows(KNOWN_INTERFACES))
        except OSError as error:
            raise RefusedError(error.errno or ENOENT) from error

    def _number(self, name: str) -> int | None:
        try:
            keys = [key for key, _, _ in self._elements.rows(name)]
        except OSError:
            return None
        return _INDEX.unpack(keys[0])[0] if len(keys) == 1 else None


def element_of(set_: str, row: SetRow) -> Element:
    """The cached verdict that a row of this set is."""
    return _element(_VERDICTS[set_[:-1]], row)


def _element(verdict: Verdict, row: SetRow) -> Element:
    key, packets, expires_ms = row
    return Element(verdict, Source.of(key), packets, expires_ms / 1000)


def _hosts(sources: Iterable[Source]) -> Prefixes:
    prefixes = Prefixes()
    for source in sources:
        prefixes.add_source(source.key)
    return prefixes


def _renewed(links: Iterable[int]) -> list[Change]:
    keys = [_INDEX.pack(index) for index in sorted(links)]
    # An `Add` of what is there would not start its time anew.
    return [Add(RENEWED, keys), Delete(RENEWED, keys), Add(RENEWED, keys)] if keys else []


def _coming(before: int | None, epoch: int) -> list[Change]:
    """What brings the set of the epochs that follow from an epoch to another one: verdicts of the table that come
    before the kernel's step are acted on."""
    steps = mark.AHEAD + 1 if before is None else (epoch - before) % mark.EPOCHS
    if steps > mark.AHEAD:
        return [Flush("coming"), Add("coming", _marks(mark.coming(epoch)))]
    if not steps or before is None:
        return []
    gone = _marks(mark.coming(before, steps))
    new = _marks(mark.coming((before + mark.AHEAD) % mark.EPOCHS, steps))
    # Added before it is deleted: to delete what another program has removed would be refused.
    return [Add("coming", [*gone, *new]), Delete("coming", gone)]


def _marks(epochs: Iterable[int]) -> list[bytes]:
    return [_INDEX.pack(epoch << mark.EPOCH_SHIFT) for epoch in epochs]


def _synced(generation: int) -> list[Change]:
    """Says, in the transaction that makes it true, that everything cached agrees with this generation."""
    return [Flush("synced"), Add("synced", [_INDEX.pack(generation)])]
