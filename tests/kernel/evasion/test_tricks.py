"""No trick gets a denied packet to port 25, whether the gateway tracks connections or not."""

from __future__ import annotations

import pytest

from kernel.evasion.ground import BANNER, Ground
from kernel.evasion.tricks import FOUR, HARMLESS, SIX, Trick
from portward.ipc.mark import Class
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6

TRICKS = [(4, trick) for trick in FOUR] + [(6, trick) for trick in SIX]


def named(pair: tuple[int, Trick]) -> str:
    """The id of a test, such as `v4-syn`."""
    return f"v{pair[0]}-{pair[1].name}"


@pytest.mark.parametrize("family", [4, 6])
def test_the_listener_greets_the_allowed_tenant_only(field: Ground, family: int) -> None:
    assert field.greeting(CONTOSO, field.source(CONTOSO, family)) == BANNER
    assert field.greeting(FABRIKAM, field.source(FABRIKAM, family), seconds=0.7) == b""


def test_connections_are_tracked_or_not(field: Ground) -> None:
    before = field.connections()
    for _ in range(5):
        assert field.greeting(CONTOSO, field.source(CONTOSO, 4)) == BANNER
    assert (field.connections() > before) is field.conntrack


def stopped(field: Ground, reason: str, source: str) -> int:
    """How many packets have been stopped for this reason so far; for `deny`, 1 if the source has a cached
    denial."""
    match reason:
        case "deny":
            held = field.held(FABRIKAM, source)
            return 0 if held is None or held.verdict is not Class.DENY else 1
        case "headers" | "unknown_frames":
            return field.counter(reason)
        case "malformed":
            return int(field.agent.metrics()['portward_worker_events_total{event="malformed"}'])
        case kernel:
            return field.stack(kernel)


@pytest.mark.parametrize("pair", TRICKS, ids=named)
def test_it_does_not_get_through(field: Ground, pair: tuple[int, Trick]) -> None:
    family, trick = pair
    source = field.source(FABRIKAM, family)
    packets = trick.build(source, MAIL4 if family == 4 else MAIL6)
    answered = field.answered(FABRIKAM)
    reason = trick.stopped_by(bridged=field.bridged, conntrack=field.conntrack)
    before = 0 if reason == HARMLESS else stopped(field, reason, source)
    field.send(FABRIKAM, *packets)
    if reason != HARMLESS:
        until(lambda: stopped(field, reason, source) > before, f"stopped by {reason}")
    field.settled()
    assert field.leaked() == (0, 0)
    assert field.answered(FABRIKAM) == answered


@pytest.mark.parametrize("pair", TRICKS, ids=named)
def test_the_same_of_a_source_that_may_send_arrives_where_it_can(field: Ground, pair: tuple[int, Trick]) -> None:
    """The packets of the test above are well formed: from an allowed source they do arrive, if `arrives` says so.
    Otherwise the test above would show nothing."""
    family, trick = pair
    source = field.source(CONTOSO, family)
    allowed = field.quiet()
    field.send(CONTOSO, *trick.build(source, MAIL4 if family == 4 else MAIL6))
    if trick.arrives and trick.reason != HARMLESS:
        until(lambda: field.allowed() > allowed, "arrived")
    else:
        field.settled()
        assert field.allowed() == allowed + 1, "what was sent last, and nothing else"
