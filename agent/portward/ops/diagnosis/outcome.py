"""Decides whether what happens to a source on this host is what the policy says. Pure.

The effect at this moment alone would mislead a customer who reads it minutes later, because a cached verdict ends.
So how this host handles sources without a cached verdict counts, too.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from portward.ops.effect import Effect, Handling, Now, lasts

# With these, packets that the policy allows are dropped, or will be when their cached verdict has ended.
_DROPPING: Final = (Handling.UNANSWERED, Handling.PART)


class Blocking(StrEnum):
    """How what happens to a source compares with the policy.

    SHUT: the policy lets it pass, but it is dropped here, or may be soon. OPEN: the policy denies it, but it
    passes here, or may soon.
    """

    AS_POLICY = "as-policy"
    SHUT = "shut"
    OPEN = "open"
    UNKNOWN = "unknown"


def outcome(how: Handling, made: Now, *, passes: bool, prefix: bool = False, opens: bool = False) -> Blocking:
    """The outcome for a source.

    `passes`: the policy lets it pass. `prefix`: the source stands for several, which may have different cached
    verdicts; `made` then applies to sources without one. `opens`: sources of its segment pass if no process has
    bound their queue.
    """
    if made.effect is Effect.UNKNOWN:
        return Blocking.UNKNOWN
    if passes and lasts(how, made):
        return Blocking.AS_POLICY
    if passes and (made.as_policy is False or how in _DROPPING):
        return Blocking.SHUT
    opened = how is Handling.UNANSWERED_OPEN or (how is Handling.PART and opens)
    if not passes and (made.as_policy is False or opened):
        return Blocking.OPEN
    cached_otherwise = prefix and how in (Handling.UNANSWERED, Handling.UNANSWERED_OPEN)
    return Blocking.UNKNOWN if how is Handling.UNWATCHED or cached_otherwise else Blocking.AS_POLICY
