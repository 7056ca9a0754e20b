"""The elements of portward's own sets: what is read and what is changed, between the cache and the kernel.

`Elements` is all that cached verdicts, rate limits and the gate need of the kernel. `KernelElements` is the
kernel; a test puts something else in its place.

Two facts of the kernel that every caller must know:
- `commit` is one transaction. A `Delete` of a key that is not in the set fails it, and so does an `Add` to a full
  set; then nothing has changed.
- A reading of a set that takes more than one message is no snapshot. Between two messages the kernel may collect
  expired elements or resize the set, and it goes on by position, so elements that were there all the time can be
  missing (690 to 2,002 of 40,000 in 3 of 60 readings), or be there twice. Nothing in the reading says so.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from errno import ENOENT
from typing import Final, NamedTuple, Protocol, TypeAlias

from portward.base.netlink import ATTRIBUTE, NESTED, attribute, nest, string
from portward.dataplane.deletions import REPORTED, Deletions, Gone
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.ruleset import COUNTING_SETS, TABLE
from portward.dataplane.setdump import SetElement, SetRow
from portward.errors import KernelError

# linux/netfilter/nf_tables.h
_NEW_RULE, _DELETE_RULE = 6, 8
_NEW_ELEMENTS, _DELETE_ELEMENTS, _NEW_OBJECT, _DELETE_OBJECT = 12, 14, 18, 20
_META_IIF, _REGISTER, _GOTO = 4, 1, -4
_OBJECT_LIMIT: Final = 4
_SECONDS_OF_A_MINUTE: Final = 60
# An attribute's length has 16 bits. This many bytes of elements stay in one message.
_MOST_BYTES: Final = 60_000


class Add(NamedTuple):
    """Puts keys into a set. A key that is there already stays as it is, with its counter and its time."""

    set: str
    keys: Sequence[bytes]


class Delete(NamedTuple):
    """Takes keys out of a set or map. A key that is not there fails the transaction with ENOENT."""

    set: str
    keys: Sequence[bytes]


class Flush(NamedTuple):
    """Takes every key out of a set or map."""

    set: str


class AddLimit(NamedTuple):
    """Makes a token bucket with this name. One that is there already stays as it is, with what was drawn from
    it."""

    name: str
    per_minute: int
    burst: int


class DeleteLimit(NamedTuple):
    """Takes a token bucket away; one that a map still names fails the transaction with EBUSY."""

    name: str


class Draw(NamedTuple):
    """Lets the keys of a map draw on a limit each, by its name. A key that is there with another limit fails the
    transaction with EEXIST."""

    map: str
    limits: Mapping[bytes, str]


class InsertRule(NamedTuple):
    """Puts the rule `iif @set goto target` at the head of a chain."""

    chain: str
    set: str
    target: str


class DeleteRule(NamedTuple):
    """Takes the rule with this handle out of a chain; one that is not there fails the transaction with ENOENT."""

    chain: str
    handle: int


Change: TypeAlias = Add | Delete | Flush | AddLimit | DeleteLimit | Draw | InsertRule | DeleteRule


class RefusedError(KernelError):
    """The kernel does not take a transaction, for the reason `errno`; nothing has changed."""

    def __init__(self, errno: int) -> None:
        self.errno = errno
        super().__init__(f"the kernel refuses a change of cached verdicts: {os.strerror(errno)}")


class Elements(Protocol):
    """The sets, maps and limits of the table `inet portward` in one network namespace. Keys are as the kernel
    keeps them: the interface index in host order, then the address in network order."""

    def rows(self, set_: str) -> list[SetRow]:
        """A reading of a set: (key, packets, milliseconds until it expires) each. Raises OSError, also if the set
        or the table is missing. See above for what a reading may miss."""

    def elements(self, set_: str) -> list[SetElement]:
        """A reading of a map, with the objects that it gives. Raises OSError as `rows` does."""

    def element(self, set_: str, key: bytes) -> SetElement | None:
        """The element with this key, or None. Raises OSError unless it is just the element that is missing."""

    def limits(self) -> list[str]:
        """The names of the limits; none without the table. Raises OSError."""

    def rules_on(self, chain: str, set_: str) -> list[int]:
        """The handles of the rules in a chain that look a set up. Raises OSError, also if the chain is missing."""

    def commit(self, changes: Iterable[Change]) -> None:
        """Makes these changes, in this order, in one transaction; raises RefusedError, and then nothing has
        changed."""


class KernelElements:
    """The elements in the kernel."""

    def __init__(
        self,
        netlink: NfNetlink,
        committing: Callable[[], AbstractContextManager[None]] = nullcontext,
        deletions: Deletions | None = None,
    ) -> None:
        """`committing` brackets each transaction (`Nft.committing`); without it nobody counts them. `deletions`
        takes the elements with a counter that are deleted."""
        self._netlink, self._committing, self._deletions = netlink, committing, deletions

    def rows(self, set_: str) -> list[SetRow]:
        """See `Elements`."""
        return self._netlink.rows(TABLE, set_)

    def elements(self, set_: str) -> list[SetElement]:
        """See `Elements`."""
        return self._netlink.elements(TABLE, set_)

    def element(self, set_: str, key: bytes) -> SetElement | None:
        """See `Elements`."""
        return self._netlink.element(TABLE, set_, key)

    def limits(self) -> list[str]:
        """See `Elements`."""
        return self._netlink.limits(TABLE)

    def rules_on(self, chain: str, set_: str) -> list[int]:
        """See `Elements`."""
        return self._netlink.rules_on(TABLE, chain, set_)

    def commit(self, changes: Iterable[Change]) -> None:
        """See `Elements`."""
        parts = [(change, list(messages(change))) for change in changes]
        found = [message for _, part in parts for message in part]
        if not found:
            return
        deletions = self._deletions or Deletions()
        plan = _Reports(((change, len(part)) for change, part in parts), deletions.sizes)
        try:
            with self._committing(), deletions.transaction() as gone:
                self._netlink.expect(plan.number)
                gone.extend(self._netlink.commit(found, reported=plan.places))
                gone.extend(plan.unreported)
        except OSError as error:
            raise RefusedError(error.errno or ENOENT) from error


class _Reports:
    """Which messages of a transaction the kernel is asked to report: those that delete elements with a counter, up
    to a number of elements."""

    def __init__(self, changes: Iterable[tuple[Change, int]], sizes: Mapping[str, int]) -> None:
        """The changes, each with how many messages it takes. `sizes` are the elements of each set at its last
        reading."""
        self.places: set[int] = set()
        self.number = 0
        # What is deleted without a report, and what flushes leave of what was read before: nothing.
        self.unreported: list[Gone | bytes] = []
        place = 0
        for change, length in changes:
            after = place + length
            if isinstance(change, Delete | Flush) and change.set in COUNTING_SETS:
                self._take(change, range(place, after), sizes)
            place = after

    def _take(self, change: Delete | Flush, places: range, sizes: Mapping[str, int]) -> None:
        number = len(change.keys) if isinstance(change, Delete) else sizes.get(change.set, REPORTED)
        fits = self.number + number <= REPORTED
        if fits:
            self.places.update(places)
            self.number += number
        if isinstance(change, Flush):
            self.unreported.append(Gone(change.set, b"", None))
        elif not fits:
            self.unreported += [Gone(change.set, key, None) for key in change.keys]


def messages(change: Change) -> Iterator[tuple[int, bytes]]:
    """A change as netlink messages: type and attributes. Each is below 64 KiB."""
    match change:
        case Add(set_, keys):
            for part in _parts(keys):
                yield _NEW_ELEMENTS, _of(set_) + nest(3, _keys(part))
        case Delete(set_, keys):
            for part in _parts(keys):
                yield _DELETE_ELEMENTS, _of(set_) + nest(3, _keys(part))
        case Flush(set_):
            yield _DELETE_ELEMENTS, _of(set_)
        case AddLimit(name, per_minute, burst):
            yield _NEW_OBJECT, _limit(name) + nest(4, _bucket(per_minute, burst))
        case DeleteLimit(name):
            yield _DELETE_OBJECT, _limit(name)
        case Draw(map_, limits):
            for part in _parts(list(limits)):
                drawn = b"".join(
                    nest(1, nest(1, attribute(1, key)) + attribute(9, string(limits[key]))) for key in part
                )
                yield _NEW_ELEMENTS, _of(map_) + nest(3, drawn)
        case InsertRule(chain, set_, target):
            yield _NEW_RULE, _of(chain) + nest(4, _goto(set_, target))
        case DeleteRule(chain, handle):
            yield _DELETE_RULE, _of(chain) + attribute(3, struct.pack(">Q", handle))


def _of(name: str) -> bytes:
    """The table, and the name of the set or chain in it."""
    return attribute(1, string(TABLE)) + attribute(2, string(name))


def _goto(set_: str, target: str) -> bytes:
    """The expressions of `iif @set goto target`: meta, lookup and immediate, as nft writes them."""
    register = struct.pack(">I", _REGISTER)
    verdict = attribute(1, struct.pack(">i", _GOTO)) + attribute(2, string(target))
    return (
        _expression("meta", attribute(1, register) + attribute(2, struct.pack(">I", _META_IIF)))
        + _expression("lookup", attribute(1, string(set_)) + attribute(2, register))
        + _expression("immediate", attribute(1, struct.pack(">I", 0)) + nest(2, nest(2, verdict)))
    )


def _expression(name: str, data: bytes) -> bytes:
    return nest(1, attribute(1, string(name)) + nest(2, data))


def _limit(name: str) -> bytes:
    return (
        attribute(1, string(TABLE)) + attribute(2, string(name)) + attribute(3, struct.pack(">I", _OBJECT_LIMIT))
    )


def _bucket(per_minute: int, burst: int) -> bytes:
    """The data of a limit object: rate, seconds that the rate is for, burst, of packets, and not inverted."""
    return (
        attribute(1, struct.pack(">Q", per_minute))
        + attribute(2, struct.pack(">Q", _SECONDS_OF_A_MINUTE))
        + attribute(3, struct.pack(">I", burst))
        + attribute(4, struct.pack(">I", 0))
        + attribute(5, struct.pack(">I", 0))
    )


def _parts(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The keys, as many at a time as one message holds, with room for a limit's name beside each."""
    if keys:
        most = _MOST_BYTES // (len(keys[0]) + 64)
        for start in range(0, len(keys), most):
            yield keys[start : start + most]


def _keys(keys: Sequence[bytes]) -> bytes:
    """Elements of nothing but a key. All keys of a set have one length, a multiple of four, so the same headers
    stand before each: element, key, value."""
    size = len(keys[0])
    before = b"".join(
        ATTRIBUTE.pack(size + inside, kind) for inside, kind in ((12, 1 | NESTED), (8, 1 | NESTED), (4, 1))
    )
    return before + before.join(keys)
