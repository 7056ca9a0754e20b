"""The lines that `portward explain` prints."""

from __future__ import annotations

import pytest

from portward.ops.effect import Effect, Now
from portward.ops.explanation import Explanation, lines


@pytest.mark.parametrize(
    ("effect", "message"),
    [
        (Effect.PASSES, "(observed only: the packet passes)"),
        (Effect.DROPPED, "(observed only)"),
        (Effect.REJECTED, "(observed only)"),
        (Effect.UNKNOWN, "(observed only)"),
    ],
)
def test_what_is_only_observed_is_said_to_pass_only_if_it_does(effect: Effect, message: str) -> None:
    found = Explanation(
        segment="vni1002",
        address="10.0.0.4",
        destination=None,
        verdict="deny",
        reason="denied-not-exempt",
        reason_in_words="",
        subscription=None,
        name=None,
        offer=None,
        matched=None,
        rule="",
        revision=1,
        decided_from="table",
        observed=True,
        kernel="",
        remedy="",
        now=Now(effect, ""),
    )
    assert next(lines(found)) == f"vni1002 10.0.0.4: DENY {message}"
