"""The changes of a store, read for the table: the records that they put and remove, and the revision that they
confirm. Does no I/O."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from portward.model import Record
from portward.store.codec import key_only, readable
from portward.store.confirmation import CONFIRMED, confirmed, confirmed_alone
from portward.store.values import Change


def records_of(batch: list[Change]) -> tuple[list[Record], list[Record]]:
    """The records that a revision puts and removes. Skips a record that cannot be read: it is named and counted
    when the revision is taken in."""
    put = (readable(change.key, change.after) for change in batch if change.key != CONFIRMED)
    removed = (key_only(change.key) for change in batch if change.after is None)
    return [one for one in put if one is not None], [one for one in removed if one is not None]


def confirmed_in(batch: list[Change]) -> int:
    """The revision up to which a revision confirms everything; 0 if it confirms none, or itself alone."""
    return max((confirmed(change.after) for change in batch if change.key == CONFIRMED), default=0)


def is_among(number: int, turned: Sequence[int]) -> bool:
    """Whether a number is among sorted ones."""
    place = bisect_left(turned, number)
    return place < len(turned) and turned[place] == number


def confirms(change: Change) -> int:
    """The revision up to which a confirmation confirms, at most its own."""
    if confirmed_alone(change.after) == change.revision:
        return change.revision
    return min(confirmed(change.after), change.revision)


def by_itself(changes: list[Change]) -> list[Change]:
    """The changes that may be taken in as one step. A revision that is confirmed alone does not confirm what is
    before it. So what is before it is one step, and the revision itself is another."""
    confirming = [change for change in changes if change.key == CONFIRMED]
    of_all = max((min(confirmed(change.after), change.revision) for change in confirming), default=0)
    for change in confirming:
        if confirmed_alone(change.after) == change.revision > of_all:
            before = [other for other in changes if other.revision < change.revision]
            return before or [other for other in changes if other.revision == change.revision]
    return changes
