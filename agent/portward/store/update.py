"""One change of a store that depends on what it holds: read, decide, write; and again where somebody else was
quicker.

What is decided on is what the store held at the revision that is written over, so two people who decide the same
case at the same time do not both get their way: the second one is refused by what the first has written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from portward.base.clock import DRIFT
from portward.errors import ConflictError, PortwardError
from portward.model import Record
from portward.store.codec import decode
from portward.store.protocol import Store
from portward.store.values import Put

# Others that write all the time: a few of them in a row are chance.
_TRIES: Final = 20


class ClockError(PortwardError):
    """This host's clock lies before what the store holds already."""


class Reading:
    """What a store holds at a revision, and the time of the change."""

    def __init__(self, store: Store, clock: Callable[[], datetime], *, trust_clock: bool) -> None:
        """Raises ClockError where the clock goes back behind the newest revision, unless it is trusted."""
        self._store = store
        self.revision = store.revision()
        self.now = _moment(clock(), store.written(), trust_clock=trust_clock)

    def get(self, key: str) -> Record | None:
        """The record under a key; raises RecordError for one that cannot be read."""
        body = self._store.get(key)
        return None if body is None else decode(key, body)


class Written(NamedTuple):
    """The revision that the store stands at after a change, and the time that the change has."""

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
    """Writes what `decide` makes of the store, which is called again after each conflict. Raises what it raises,
    StoreError, and ClockError."""
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
    """The time of a change: never before that of the change before, or a grant could lie before the start of a
    machine that it comes after, and count without a restart."""
    if newest is None or trust_clock or now > newest:
        return now
    if newest - now > DRIFT:
        raise ClockError(
            f"this host's clock says {now:%Y-%m-%d %H:%M:%SZ}, and the store's newest change is of "
            f"{newest:%Y-%m-%d %H:%M:%SZ}: set the clock, or say --trust-clock where that change was dated wrongly"
        )
    return newest + timedelta(microseconds=1)
