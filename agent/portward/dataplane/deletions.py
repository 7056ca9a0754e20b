"""Cached elements that were deleted, with what they had counted: from the kernel thread to the counting thread.

The kernel says what an element had counted when it deletes it, if it is asked to (NLM_F_ECHO). So no packet is
lost between the last reading of an element and its deletion, but for those that another processor has in hand at
that moment.

A reading and a deletion may overlap. Whoever reads asks `take` before and after. What it gives afterwards was
deleted before the reading, during it or a moment later, so the rows with these keys may be of the old element or
of a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Final, NamedTuple

from portward.base.netlink import attributes_of
from portward.dataplane import setdump

# Elements of one transaction that the kernel reports. Each takes some 300 bytes of the socket's buffer; to flush a
# full set must not wait for a quarter of a million of them.
REPORTED: Final = 20_000
# How long a reading waits for transactions of the kernel thread.
_PATIENCE_S: Final = 2.0


class Gone(NamedTuple):
    """A deleted element: its set, its key (empty: all that were in the set), and the packets that it had counted;
    None: the kernel was not asked."""

    set: str
    key: bytes
    packets: int | None


class Deletions:
    """What was deleted since it was last taken. May be used on two threads."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._under_way = 0
        self._gone: list[Gone | bytes] = []
        # Set → elements at the last reading.
        self.sizes: dict[str, int] = {}

    @contextmanager
    def transaction(self) -> Iterator[list[Gone | bytes]]:
        """Stands around a transaction of the kernel thread; takes what it deleted, in that order: replies of the
        kernel as they came, or `Gone`. If the transaction fails, nothing was deleted."""
        with self._changed:
            self._under_way += 1
        gone: list[Gone | bytes] = []
        try:
            yield gone
        except BaseException:
            gone = []
            raise
        finally:
            with self._changed:
                self._under_way -= 1
                self._gone += gone
                self._changed.notify_all()

    def take(self) -> list[Gone] | None:
        """What was deleted since the last time, once no transaction is under way; None if one is for long."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._under_way, _PATIENCE_S):
                return None
            gone, self._gone = self._gone, []
        return list(_read(gone))


def _read(gone: Iterable[Gone | bytes]) -> Iterator[Gone]:
    for one in gone:
        if isinstance(one, Gone):
            yield one
            continue
        attributes = dict(attributes_of(one))
        name = attributes[2].rstrip(b"\0").decode()
        for element in setdump.elements(attributes.get(3, b"")):
            yield Gone(name, element.key, element.packets)
