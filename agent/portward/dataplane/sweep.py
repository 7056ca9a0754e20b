"""Taking everything that lies in some prefixes out of the sets of cached verdicts.

A reading of a larger set can miss elements that are there (see `elements`), because the kernel collects expired
ones or resizes the set meanwhile. So a set is cleared only when a reading has found nothing more in it, has not
shown any element twice, and began so soon after another one that the kernel cannot have disturbed both by
collecting.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from portward.dataplane.elements import Add, Change, Delete, Elements, Flush, RefusedError
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.setdump import SetRow

# A reading of no more elements than this fits into one message, and is a snapshot.
_ONE_MESSAGE: Final = 32
# Readings of one set until it is flushed instead.
_READINGS: Final = 5
# The kernel collects expired elements once a second.
_COLLECTED_EVERY_S: Final = 0.9
# An element with less time left than this may be gone before it is deleted.
_SOON_MS: Final = 5_000
# For each message of a reading the kernel goes through the set from its beginning, so the time grows with the
# square of the size (25,000 elements 25 ms, 100,000 0.4 s, 250,000 2 s). A set with more elements than this is
# flushed unread.
_READABLE: Final = 100_000
# A change of many prefixes is a batch and therefore rare: it flushes earlier, so that it is enforced within 0.1 s.
_READABLE_FOR_MANY: Final = 32_768
_MANY_PREFIXES: Final = 256
# From this many elements on a set of which nine tenths are to go is flushed: that saves the second reading.
_WORTH_A_FLUSH: Final = 4_096


class Sweep:
    """One change's work on the sets. `found` are the keys that were found in prefixes so far, by set."""

    def __init__(
        self,
        elements: Elements,
        sizes: dict[str, int],
        prefixes: Prefixes,
    ) -> None:
        """`sizes` are the elements of each set as last read, and is kept up to date."""
        self._elements, self._sizes, self._prefixes = elements, sizes, prefixes
        self._readable = _READABLE if len(prefixes) < _MANY_PREFIXES else _READABLE_FOR_MANY
        self._began: dict[str, float] = {}
        self.found: dict[str, set[bytes]] = {}

    def clear(self, name: str, family: str) -> None:
        """Takes what lies in the prefixes out of a set (its name, and the digit of its family). Raises OSError,
        and KernelError if the kernel refuses even to flush the set."""
        set_ = name + family
        for _ in range(_READINGS):
            # Also after a reading: before the first one the size may be unknown.
            if self._sizes.get(set_, 0) > self._readable:
                break
            before = self._began.get(set_)
            rows, deletions = self._read(set_, family)
            if deletions == [Flush(set_)]:
                break
            if deletions:
                with suppress(RefusedError):  # an element has expired, or the set is full: the next reading shows
                    self._elements.commit(deletions)
            elif len(rows) <= _ONE_MESSAGE or (_soon_after(before) and _each_once(rows)):
                return
        self._elements.commit([Flush(set_)])
        self._sizes[set_] = 0

    def _read(self, set_: str, family: str) -> tuple[list[SetRow], list[Change]]:
        """A reading of a set, and what deletes those of its elements that lie in the prefixes."""
        self._began[set_] = time.monotonic()
        rows = self._elements.rows(set_)
        self._sizes[set_] = len(rows)
        found = self._prefixes.among(family, [key for key, _, _ in rows])
        if not found:
            return rows, []
        before = self.found.setdefault(set_, set())
        going = [row for row in rows if row[0] in found]
        before |= found
        if len(found) >= _WORTH_A_FLUSH and 10 * len(found) >= 9 * len(rows):
            return rows, [Flush(set_)]
        return rows, _deletions(set_, going)


def _deletions(set_: str, rows: list[SetRow]) -> list[Change]:
    """What deletes these elements. One that may expire before is added first, which makes its deletion succeed in
    any case; for all of them that would take three times as long."""
    soon = list({key for key, _, expires_ms in rows if 0 < expires_ms < _SOON_MS})
    rest = list({key for key, _, expires_ms in rows} - set(soon))
    changes: list[Change] = [Add(set_, soon), Delete(set_, soon)] if soon else []
    return [*changes, Delete(set_, rest)] if rest else changes


def _each_once(rows: list[SetRow]) -> bool:
    return len({key for key, _, _ in rows}) == len(rows)


def _soon_after(before: float | None) -> bool:
    """Whether a reading that began at `before` can have been disturbed by another collection than this one."""
    return before is not None and time.monotonic() - before < _COLLECTED_EVERY_S
