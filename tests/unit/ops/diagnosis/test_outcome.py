"""The outcome compares the present handling of a source with the policy, and holds for some minutes."""

from __future__ import annotations

import pytest

from portward.ops.diagnosis.outcome import Blocking, outcome
from portward.ops.effect import Effect, Handling, Now


@pytest.mark.parametrize(
    ("place", "effect", "found"),
    [
        # The kernel has the limit itself, and needs no worker.
        (Handling.UNANSWERED, Effect.LIMITED, Blocking.AS_POLICY),
        (Handling.UNANSWERED_OPEN, Effect.LIMITED, Blocking.AS_POLICY),
        (Handling.UNWATCHED, Effect.LIMITED, Blocking.AS_POLICY),
        # A worker may have given this verdict.
        (Handling.PART, Effect.LIMITED, Blocking.SHUT),
        # A cached verdict expires.
        (Handling.UNANSWERED, Effect.PASSES, Blocking.SHUT),
        (Handling.UNWATCHED, Effect.PASSES, Blocking.UNKNOWN),
        (Handling.BY_POLICY, Effect.PASSES, Blocking.AS_POLICY),
    ],
)
def test_who_passes_within_a_limit_needs_no_worker(place: Handling, effect: Effect, found: Blocking) -> None:
    assert outcome(place, Now(effect, ""), passes=True) is found


def test_a_limit_that_the_policy_has_taken_away_is_open_still() -> None:
    made = Now(Effect.LIMITED, "", as_policy=False)
    assert outcome(Handling.UNANSWERED, made, passes=False) is Blocking.OPEN
