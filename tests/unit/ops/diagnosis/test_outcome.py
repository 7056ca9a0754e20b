"""Whether what happens to a source is what the policy says, also minutes later."""

from __future__ import annotations

import pytest

from portward.ops.diagnosis.outcome import Blocking, outcome
from portward.ops.effect import Effect, Here, Now


@pytest.mark.parametrize(
    ("place", "effect", "found"),
    [
        # The kernel has the limit itself, and no worker is asked.
        (Here.NOBODY_ANSWERS, Effect.LIMITED, Blocking.AS_POLICY),
        (Here.NOBODY_ANSWERS_OPEN, Effect.LIMITED, Blocking.AS_POLICY),
        (Here.UNWATCHED, Effect.LIMITED, Blocking.AS_POLICY),
        # Here a worker may say it.
        (Here.PART, Effect.LIMITED, Blocking.SHUT),
        # A cached verdict ends.
        (Here.NOBODY_ANSWERS, Effect.PASSES, Blocking.SHUT),
        (Here.UNWATCHED, Effect.PASSES, Blocking.UNKNOWN),
        (Here.JUDGES, Effect.PASSES, Blocking.AS_POLICY),
    ],
)
def test_who_passes_within_a_limit_needs_no_worker(place: Here, effect: Effect, found: Blocking) -> None:
    assert outcome(place, Now(effect, ""), passes=True) is found


def test_a_limit_that_the_policy_has_taken_away_is_open_still() -> None:
    made = Now(Effect.LIMITED, "", as_policy=False)
    assert outcome(Here.NOBODY_ANSWERS, made, passes=False) is Blocking.OPEN
