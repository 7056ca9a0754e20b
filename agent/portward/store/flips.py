"""How many customers a change turns over: what turns too many at once is more likely a mistake than meant.

A subscription flips where a source of its own that could open connections no longer can, or the other way round.
Customers and sources that are new flip nothing.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import datetime
from math import ceil
from typing import Final, NamedTuple, cast
from uuid import UUID

from portward.base.words import counted
from portward.errors import PortwardError
from portward.model import Attachment, Exemption, Mode, Record, Subscription
from portward.policy.decide import decide
from portward.policy.preset import Preset
from portward.store.codec import readable
from portward.store.values import Put

# So few are never held: in a small store one change of one customer is a large share.
_FEW: Final = 10


class Flips(NamedTuple):
    """Subscriptions that a change would flip, of so many that there are."""

    flipped: int
    subscriptions: int

    def too_many(self, share: float) -> bool:
        """Whether it is more than `share` (0 to 1) of all, which is `max_flip_share`."""
        return self.flipped > self._limit(share)

    def excess(self, share: float) -> int:
        """How many fewer would have to flip for the change to pass; 0 or less if it passes."""
        return ceil(self.flipped - self._limit(share))

    def _limit(self, share: float) -> float:
        return max(_FEW, share * self.subscriptions)

    def describe(self, share: float) -> str:
        """In words, with the limit."""
        return (
            f"would flip the verdict of {self.flipped} of {counted(self.subscriptions, 'subscription')}, more "
            f"than max_flip_share = {share:g} lets pass"
        )


class UnconfirmedError(PortwardError):
    """A change would flip too many subscriptions, and nobody has confirmed that."""

    def __init__(self, flips: Flips, share: float, turned: Sequence[int] = ()) -> None:
        """`turned` are the policy table's numbers of the subscriptions that would flip, sorted."""
        super().__init__(flips.describe(share))
        self.flips, self.turned = flips, turned


def check_flips(
    have: Mapping[str, str], batch: Sequence[Put], preset: Preset, *, share: float, now: datetime
) -> None:
    """Raises UnconfirmedError where writing a batch over the records `have` (key → JSON) would flip too many, as a
    gateway with this preset sees it."""
    # One record flips one subscription at most: a million new ones need not be gone through.
    possible = sum(put.key in have or not put.key.startswith("attachments/") for put in batch)
    if possible > _FEW:
        found = flips(have, batch, preset, now)
        if found.too_many(share):
            raise UnconfirmedError(found, share)


def flips(have: Mapping[str, str], batch: Sequence[Put], preset: Preset, now: datetime) -> Flips:
    """What a batch over the records `have` flips."""
    put: MutableMapping[str, str | None] = {put.key: put.body for put in batch}
    touched = {key.partition("/")[2] for key in put if not key.startswith("attachments/")}
    after = ChainMap[str, str | None](put, cast("MutableMapping[str, str | None]", have))
    flipped: set[UUID] = set()
    for key in have:
        attachment = readable(key, have[key])
        if not isinstance(attachment, Attachment) or attachment.subscription in flipped:
            continue
        if (key in put or str(attachment.subscription) in touched) and (
            _passes(have, attachment, preset, now) != _passes(after, readable(key, after[key]), preset, now)
        ):
            flipped.add(attachment.subscription)
    return Flips(len(flipped), sum(key.startswith("subscriptions/") for key in have))


def _passes(records: Mapping[str, str | None], attachment: Record | None, preset: Preset, now: datetime) -> bool:
    """Whether the attachment's sources can open connections."""
    if not isinstance(attachment, Attachment):
        return False
    subscription, exemption = (
        readable(key, records.get(key))
        for key in (f"subscriptions/{attachment.subscription}", f"exemptions/{attachment.subscription}")
    )
    if not isinstance(subscription, Subscription):
        return False
    exempt = exemption if isinstance(exemption, Exemption) else None
    decision = decide(preset, subscription=subscription, exemption=exempt, attachment=attachment, now=now)
    return decision.allows or subscription.mode is Mode.OBSERVE
