"""The lines that `portward explain` prints."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from portward.errors import KernelError
from portward.ipc.mark import Class
from portward.ops import explanation, host
from portward.ops.effect import Effect, Now
from portward.ops.explanation import Explanation, lines
from portward.ops.host_state import CachedState


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


@pytest.mark.parametrize(
    ("cached", "line"),
    [
        (PermissionError(), "not known: asking the kernel needs root or CAP_NET_ADMIN"),
        (KernelError("nfnetlink: no"), "not known: asking the kernel needs root or CAP_NET_ADMIN"),
        (None, "there is no interface vni1002 here now"),
        (CachedState(loaded=False), "has cached nothing: the ruleset that caches is not loaded here"),
        (CachedState(), "has cached nothing for this source"),
        (
            CachedState(limit="60 a minute", packets=3),
            "lets its subscription open new connections, 60 a minute; dropped lately of this source: 3",
        ),
        (
            CachedState(verdict=Class.DENY, expires=41.6, packets=1),
            "has cached 'deny' for 42 s more, 1 packet so far",
        ),
        (
            CachedState(verdict=Class.OBSERVED, expires=7.0, packets=2),
            "has cached 'observed' for 7 s more, 2 packets so far",
        ),
    ],
)
def test_the_kernels_cache_is_put_into_words(
    monkeypatch: pytest.MonkeyPatch, cached: Exception | CachedState | None, line: str
) -> None:
    def answer(*_: object) -> CachedState | None:
        if isinstance(cached, Exception):
            raise cached
        return cached

    monkeypatch.setattr(host, "cached", answer)
    asked = explanation._ask_kernel({"vni1002": 7}, ip_address("10.0.0.4"))
    assert explanation._kernel("vni1002", asked) == line
