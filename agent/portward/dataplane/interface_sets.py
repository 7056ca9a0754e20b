"""The interfaces that the ruleset treats apart: those whose owner is uncertain, those that got another owner, and
those that may send mail without being a segment. Pure, over `Elements`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from errno import ENOENT
from typing import Final

from portward.dataplane.elements import Add, Change, Delete, Elements, RefusedError
from portward.dataplane.names import KNOWN_INTERFACES, RENEWED, UNSETTLED

# An interface index, in the byte order of the host.
_NUMBER: Final = struct.Struct("=I")


class InterfaceSets:
    """The sets UNSETTLED, RENEWED and KNOWN_INTERFACES of one network namespace. Methods raise KernelError."""

    def __init__(self, elements: Elements) -> None:
        self._elements = elements

    def renew(self, links: Iterable[int]) -> None:
        """Takes note that these interfaces have other owners. For ten seconds a verdict on their packets does not
        count if it was found under an older epoch, or for the forward guard. Raises KernelError."""
        self._elements.commit(renewed(links))

    def unsettle(self, indexes: Iterable[int]) -> None:
        """From now on packets of these interfaces to policy ports are dropped without a question, and their
        verdicts are not cached, also of packets that wait for a worker now. Raises KernelError."""
        indexes = list(indexes)
        unsettled = Add(UNSETTLED, [_NUMBER.pack(index) for index in indexes])
        self._elements.commit([unsettled, *renewed(indexes)])

    def settle(self, indexes: Iterable[int]) -> None:
        """Ends `unsettle` for these interfaces. Raises KernelError."""
        self._elements.commit([Delete(UNSETTLED, [_NUMBER.pack(index) for index in indexes])])

    def set_known(self, indexes: frozenset[int]) -> bool:
        """Makes these indexes the elements of KNOWN_INTERFACES; False if they already were. Raises KernelError,
        also if there is no such set."""
        had = self._known()
        if had == indexes:
            return False
        gone, new = ([_NUMBER.pack(index) for index in sorted(part)] for part in (had - indexes, indexes - had))
        self._elements.commit([Delete(KNOWN_INTERFACES, gone), Add(KNOWN_INTERFACES, new)])
        return True

    def retain_known(self, indexes: frozenset[int]) -> None:
        """Deletes all but these indexes from KNOWN_INTERFACES. Raises KernelError as `set_known` does."""
        self.set_known(self._known() & indexes)

    def _known(self) -> frozenset[int]:
        try:
            return frozenset(_NUMBER.unpack(key)[0] for key, _, _ in self._elements.rows(KNOWN_INTERFACES))
        except OSError as error:
            raise RefusedError(error.errno or ENOENT, error.strerror or str(error)) from error


def renewed(links: Iterable[int]) -> list[Change]:
    """The changes that `InterfaceSets.renew` makes, for a transaction that makes others too."""
    keys = [_NUMBER.pack(index) for index in sorted(links)]
    # An `Add` of an element that is there would not extend its time.
    return [Add(RENEWED, keys), Delete(RENEWED, keys), Add(RENEWED, keys)] if keys else []
