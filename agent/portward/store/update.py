"""One change of a store that depends on its records: read, decide, write; and again after a conflict.

The decision is made on the revision that it replaces. So if two people decide the same case at the same time, the
second decision is made, or refused, on what the first one wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from portward.base.limits import CLOCK_DRIFT
from portward.errors import ConflictError, PortwardError
from portward.model import Record
from portward.store.codec import decode
from portward.store.protocol import Store
from portward.store.values import Put

# Each try takes milliseconds. Twenty conflicts in a row mean that another process writes without a pause.
_TRIES: Final = 20


class ClockError(PortwardError):
    """This host's clock is behind the newest revision of the store."""


class Reading:
    """The records of a store at a revision, and the time of the change."""

    def __init__(self, store: Store, clock: Callable[[], datetime], *, trust_clock: bool) -> None:
        """Raises ClockError if the clock is behind the newest revision, unless it is trusted."""
        self._store = store
        self.revision = store.revision()
        self.now = _moment(clock(), store.written(), trust_clock=trust_clock)

    def get(self, key: str) -> Record | None:
        """The record with this key, None if there is none. Raises RecordError if it cannot be read."""
        body = self._store.get(key)
        return None if body is None else decode(key, body)


class Written(NamedTuple):
    """The store's revision after a change, and the time of the change."""

    revision: int
    at: datetime


def update(
    store: Store,
    decide: Callable[[Reading], Sequence[Put]],
    *,
    actor: str,
    clock: Callable[[], datetime],
    trust_clock: bool = False,
) -> Written:
    """Writes the batch that `decide` returns, and calls it again after each conflict. Raises the errors of
    `decide`, StoreError, and ClockError."""
    for left in reversed(range(_TRIES)):
        reading = Reading(store, clock, trust_clock=trust_clock)
        puts = decide(reading)
        try:
            revision = store.write(puts, expected=reading.revision, actor=actor, at=reading.now)
            return Written(revision, reading.now)
        except ConflictError:
            if not left:
                raise
    raise AssertionError("a try returns or raises")


def _moment(now: datetime, newest: datetime | None, *, trust_clock: bool) -> datetime:
    """The time of a change, which is always after that of the change before. Otherwise a grant could be dated
    before a machine's start that it follows, and count without a restart."""
    if newest is None or trust_clock or now > newest:
        return now
    if newest - now > CLOCK_DRIFT:
        raise ClockError(
            f"this host's clock says {now:%Y-%m-%d %H:%M:%SZ}, and the store's newest change is of "
            f"{newest:%Y-%m-%d %H:%M:%SZ}: set the clock, or say --trust-clock where that change was dated wrongly"
        )
    return newest + timedelta(microseconds=1)
