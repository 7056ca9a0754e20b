"""The kernel as `Elements`: a change becomes netlink messages, and a deletion is reported with its counter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from errno import ENOENT

from portward.dataplane.deletions import MAX_REPORTED_ELEMENTS, Deletions
from portward.dataplane.elements import Change, Delete, Flush, RefusedError, messages
from portward.dataplane.names import COUNTING_SETS, TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.setdump import DeletedElement, SetElement, SetRow


class KernelElements:
    """The elements of the table `inet portward` in the network namespace of a netlink socket. For one thread."""

    def __init__(
        self,
        netlink: NfNetlink,
        committing: Callable[[], AbstractContextManager[None]] = nullcontext,
        deletions: Deletions | None = None,
    ) -> None:
        """`committing` stands around each transaction and counts it as portward's own (`Nft.committing`); a caller
        that does not compare generations needs none. `deletions` takes what deleted elements had counted."""
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

    def now(self) -> float:
        """See `Elements`."""
        return time.monotonic()

    def commit(self, changes: Iterable[Change]) -> None:
        """See `Elements`."""
        parts = [(change, list(messages(change))) for change in changes]
        sent = [message for _, part in parts for message in part]
        if not sent:
            return
        deletions = self._deletions or Deletions()
        plan = _ReportPlan(((change, len(part)) for change, part in parts), deletions.sizes)
        try:
            with self._committing(), deletions.transaction() as deleted:
                self._netlink.expect(plan.elements)
                deleted.extend(self._netlink.commit(sent, reported=plan.places))
                deleted.extend(plan.unreported)
        except OSError as error:
            raise RefusedError(error.errno or ENOENT, error.strerror or str(error)) from error


class _ReportPlan:
    """Which messages of a transaction the kernel must report: those that delete elements with a counter, up to
    `MAX_REPORTED_ELEMENTS` elements."""

    def __init__(self, changes: Iterable[tuple[Change, int]], sizes: Mapping[str, int]) -> None:
        """`changes` are in their order, each with the number of its messages. `sizes` has the number of elements
        of each set at its last reading."""
        # Places of the messages in the transaction, from 0.
        self.places: set[int] = set()
        # Elements that will be reported.
        self.elements = 0
        # Deletions without a report. A flush also ends all readings of the set, with or without a report.
        self.unreported: list[DeletedElement | bytes] = []
        place = 0
        for change, length in changes:
            after = place + length
            if isinstance(change, Delete | Flush) and change.set in COUNTING_SETS:
                self._take(change, range(place, after), sizes)
            place = after

    def _take(self, change: Delete | Flush, places: range, sizes: Mapping[str, int]) -> None:
        # A set of unknown size counts as full.
        elements = len(change.keys) if isinstance(change, Delete) else sizes.get(change.set, MAX_REPORTED_ELEMENTS)
        fits = self.elements + elements <= MAX_REPORTED_ELEMENTS
        if fits:
            self.places.update(places)
            self.elements += elements
        if isinstance(change, Flush):
            self.unreported.append(DeletedElement(change.set, b"", None))
        elif not fits:
            self.unreported += [DeletedElement(change.set, key, None) for key in change.keys]
