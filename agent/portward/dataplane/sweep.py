"""Deletes all cached verdicts of some prefixes from a set. Pure, over `Elements`.

A reading of a larger set can miss elements (see `elements`), because the kernel collects expired elements or
resizes the set meanwhile. So a set is clear only after a reading that found nothing to delete, that showed no
element twice, and that began so soon after another one that the kernel's collection cannot have disturbed both.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from portward.dataplane.elements import Add, Change, Delete, Elements, Flush, RefusedError
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.setdump import SetRow

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


class Sweep:
    """The work of one change on the sets. `found` are the keys that were in the prefixes so far, by set."""

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
                with suppress(
                    RefusedError
                ):  # an element has expired, or the set is full: the next reading shows it
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
