"""How many customers a change turns over. A change that turns over too many at once is probably a mistake.

A subscription *flips* if one of its sources could open connections before and cannot after, or the other way
round. New subscriptions and new sources do not count.
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

# This many flips never need a confirmation: in a small store, one customer is a large share.
_FEW: Final = 10


class Flips(NamedTuple):
    """The number of subscriptions that a change would flip, and of all subscriptions."""

    flipped: int
    subscriptions: int

    def too_many(self, share: float) -> bool:
        """Whether more than `share` of all would flip. `share` is `max_flip_share`, 0 to 1."""
        return self.flipped > self._limit(share)

    def excess(self, share: float) -> int:
        """How many flips fewer the change would need to pass; 0 or less if it passes."""
        return ceil(self.flipped - self._limit(share))

    def _limit(self, share: float) -> float:
        return max(_FEW, share * self.subscriptions)

    def describe(self, share: float) -> str:
        """A text for operators, with the limit."""
        return (
            f"would flip the verdict of {self.flipped} of {counted(self.subscriptions, 'subscription')}, more "
            f"than max_flip_share = {share:g} lets pass"
        )


class UnconfirmedError(PortwardError):
    """A change would flip too many subscriptions, and is not confirmed."""

    def __init__(self, flips: Flips, share: float, turned: Sequence[int] = ()) -> None:
        """`turned` are the numbers in the policy table of the subscriptions that would flip, sorted."""
        super().__init__(flips.describe(share))
        self.flips, self.turned = flips, turned


def check_flips(
    have: Mapping[str, str], batch: Sequence[Put], preset: Preset, *, share: float, now: datetime
) -> None:
    """Raises UnconfirmedError if a batch, written over the records `have` (key → JSON), would flip too many
    subscriptions under this preset."""
    # A record flips at most one subscription. This bound saves decoding a million new records.
    possible = sum(put.key in have or not put.key.startswith("attachments/") for put in batch)
    if possible > _FEW:
        found = flips(have, batch, preset, now)
        if found.too_many(share):
            raise UnconfirmedError(found, share)


def flips(have: Mapping[str, str], batch: Sequence[Put], preset: Preset, now: datetime) -> Flips:
    """The flips of a batch over the records `have` (key → JSON)."""
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
    """Whether the sources of the attachment can open connections."""
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
