"""Whether what happens to a source on this host is what the policy says. Pure.

The effect of this moment alone would mislead a customer who reads of it minutes later, because a cached verdict
ends. So it also counts what this host does to sources without one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from portward.ops.effect import Effect, Handling, Now, lasts

# What the policy lets pass is dropped there, or as soon as its cached verdict has ended.
_DROPPING: Final = (Handling.UNANSWERED, Handling.PART)


class Blocking(StrEnum):
    """What happens to a source. SHUT: the policy lets it pass, and it is dropped here, or may be soon. OPEN: the
    policy does not, and it passes here, or may soon. UNKNOWN: that is not known."""

    AS_POLICY = "as-policy"
    SHUT = "shut"
    OPEN = "open"
    UNKNOWN = "unknown"


def outcome(place: Handling, made: Now, *, passes: bool, prefix: bool = False, opens: bool = False) -> Blocking:
    """The outcome for a source that the policy lets pass (`passes`) or not. `prefix`: it stands for several, of
    which each may have another cached verdict, and `made` holds without one. `opens`: sources of its segment pass
    if nobody has bound their queue."""
    if made.effect is Effect.UNKNOWN:
        return Blocking.UNKNOWN
    if passes and lasts(place, made):
        return Blocking.AS_POLICY
    if passes and (made.as_policy is False or place in _DROPPING):
        return Blocking.SHUT
    opened = place is Handling.UNANSWERED_OPEN or (place is Handling.PART and opens)
    if not passes and (made.as_policy is False or opened):
        return Blocking.OPEN
    cached_otherwise = prefix and place in (Handling.UNANSWERED, Handling.UNANSWERED_OPEN)
    return Blocking.UNKNOWN if place is Handling.UNWATCHED or cached_otherwise else Blocking.AS_POLICY
