"""Cached elements that were deleted, with what they had counted: from the kernel thread to the counting thread.

When the kernel deletes an element it reports, if asked (NLM_F_ECHO), what the element had counted. So no packet is
lost between the last reading of an element and its deletion, except those that another processor is handling at
that moment.

A reading and a deletion may overlap, so the reader calls `take` before and after the reading. The elements of the
second call were deleted before the reading, during it, or a moment later. A row with one of these keys may be of
the old element or of a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Final

from portward.base.netlink import attributes_of
from portward.dataplane import setdump
from portward.dataplane.names import KernelTable
from portward.dataplane.nf_tables import NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET
from portward.dataplane.setdump import DeletedElement

# Elements of one transaction that the kernel reports. Each takes some 300 bytes of the socket's buffer, and the
# flush of a full set must not wait for 262,144 reports.
MAX_REPORTED_ELEMENTS: Final = 20_000
# How long a reading waits for transactions of the kernel thread: longer than any but a load of the ruleset.
_TRANSACTION_TIMEOUT_S: Final = 2.0


class Deletions:
    """The elements that were deleted since the last `take`. May be used on two threads."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._transactions = 0  # under way
        self._deleted: list[tuple[KernelTable, DeletedElement | bytes]] = []
        # Qualified name of a set → number of elements at the last reading.
        self.sizes: dict[str, int] = {}

    def size(self, set_: str) -> int:
        """The number of elements that a set (by its qualified name) may have. One of unknown size counts as
        full."""
        return self.sizes.get(set_, MAX_REPORTED_ELEMENTS)

    @contextmanager
    def transaction(self, table: KernelTable = KernelTable.INET) -> Iterator[list[DeletedElement | bytes]]:
        """Stands around a transaction of the kernel thread on sets of a table. The thread appends what it deleted,
        in that order: the kernel's reports as they came, or `DeletedElement` with the set's own name. If the
        transaction fails, nothing was deleted."""
        with self._changed:
            self._transactions += 1
        deleted: list[DeletedElement | bytes] = []
        try:
            yield deleted
        except BaseException:
            deleted = []
            raise
        finally:
            with self._changed:
                self._transactions -= 1
                self._deleted += [(table, one) for one in deleted]
                self._changed.notify_all()

    def take(self) -> list[DeletedElement] | None:
        """The elements that were deleted since the last call, with qualified names of their sets. Waits until no
        transaction is under way; None if one takes longer than two seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._transactions, _TRANSACTION_TIMEOUT_S):
                return None
            deleted, self._deleted = self._deleted, []
        return list(_parsed(deleted))


def _parsed(deleted: Iterable[tuple[KernelTable, DeletedElement | bytes]]) -> Iterator[DeletedElement]:
    for table, one in deleted:
        if isinstance(one, DeletedElement):
            yield one._replace(set=table.qualified(one.set))
            continue
        attributes = dict(attributes_of(one))
        name = table.qualified(attributes[NFTA_SET_ELEM_LIST_SET].rstrip(b"\0").decode())
        for element in setdump.elements(attributes.get(NFTA_SET_ELEM_LIST_ELEMENTS, b"")):
            yield DeletedElement(name, element.key, element.packets)
