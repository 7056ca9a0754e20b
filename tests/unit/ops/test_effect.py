"""The fate of a source's next packet, from the state of the host, the cache and the policy."""

from __future__ import annotations

import msgspec
import pytest

from portward.dataplane.stacking import Fate
from portward.ipc.mark import Class
from portward.ops.effect import Effect, Handling, Policy, handling, now
from portward.ops.host_state import Agent, CachedState, Host, Ruleset, TableVerdict, Workers

ALLOW, DENY, REJECT = Policy(verdict="allow"), Policy(verdict="deny"), Policy(verdict="reject")
OBSERVED = Policy(verdict="deny", observed=True)
LIMITED = Policy(verdict="allow", limited=True)
NOTHING = CachedState()
DOWN = Host(agent=Agent.NONE, workers=Workers.NONE)
DOWN_OBSERVED = Host(agent=Agent.NONE, workers=Workers.NONE, opens=True, observed=True)
DOWN_OPEN = Host(agent=Agent.NONE, workers=Workers.NONE, opens=True)
DEAF = Host(workers=Workers.DEAF, opens=True)
BARE = Host(ruleset=Ruleset.NONE, ruleset_error="Operation not permitted")
CLOSED = Host(agent=Agent.NONE, ruleset=Ruleset.CLOSED, workers=Workers.NONE, opens=True)
BRIDGE = ("bridge br0 takes the packets",)
STOPPED = Host(stacked=BRIDGE, fate=Fate.STOPPED)


def cached(verdict: Class) -> CachedState:
    """A cached verdict."""
    return CachedState(verdict=verdict, expires=30.4, packets=2)


@pytest.mark.parametrize(
    ("host", "found", "policy", "effect", "as_policy"),
    [
        (Host(), NOTHING, ALLOW, Effect.PASSES, True),
        (Host(), NOTHING, DENY, Effect.DROPPED, True),
        (Host(), NOTHING, REJECT, Effect.REJECTED, True),
        (Host(), NOTHING, OBSERVED, Effect.PASSES, True),
        (Host(), NOTHING, LIMITED, Effect.LIMITED, True),
        (Host(), CachedState(limit="10 a minute, 5 at once"), LIMITED, Effect.LIMITED, True),
        (Host(), cached(Class.ALLOW), ALLOW, Effect.PASSES, True),
        (Host(), cached(Class.ALLOW), DENY, Effect.PASSES, False),
        (Host(), cached(Class.OBSERVED), OBSERVED, Effect.PASSES, True),
        (Host(), cached(Class.DENY), ALLOW, Effect.DROPPED, False),
        (Host(), cached(Class.REFUSED), REJECT, Effect.REJECTED, True),
        (Host(), cached(Class.UNKNOWN), DENY, Effect.DROPPED, True),
        (Host(workers=Workers.PART), NOTHING, ALLOW, Effect.PASSES, True),
        (DOWN, NOTHING, ALLOW, Effect.DROPPED, False),
        (DOWN, NOTHING, DENY, Effect.DROPPED, True),
        (DOWN, cached(Class.ALLOW), ALLOW, Effect.PASSES, True),
        (DOWN_OBSERVED, NOTHING, OBSERVED, Effect.PASSES, True),
        # The subscription is observed. The kernel does not know that, and no worker runs that does.
        (DOWN, NOTHING, OBSERVED, Effect.DROPPED, False),
        (DOWN_OPEN, NOTHING, DENY, Effect.PASSES, False),
        (DOWN_OPEN, cached(Class.DENY), DENY, Effect.DROPPED, True),
        (DEAF, NOTHING, ALLOW, Effect.DROPPED, False),
        (BARE, NOTHING, DENY, Effect.PASSES, False),
        (BARE, None, DENY, Effect.PASSES, False),
        (CLOSED, NOTHING, ALLOW, Effect.DROPPED, False),
        # A worker writes the reset.
        (DOWN, cached(Class.REFUSED), REJECT, Effect.DROPPED, True),
        (DOWN_OPEN, cached(Class.REFUSED), REJECT, Effect.DROPPED, True),
        (DEAF, cached(Class.REFUSED), REJECT, Effect.DROPPED, True),
        (Host(workers=Workers.PART), cached(Class.REFUSED), REJECT, Effect.REJECTED, True),
        (DOWN, NOTHING, Policy(verdict="allow", internal=True), Effect.PASSES, True),
        (Host(), None, ALLOW, Effect.UNKNOWN, None),
        (STOPPED, cached(Class.ALLOW), ALLOW, Effect.DROPPED, False),
        (STOPPED, NOTHING, DENY, Effect.DROPPED, True),
        (STOPPED, NOTHING, OBSERVED, Effect.DROPPED, False),
        (STOPPED, NOTHING, Policy(verdict="allow", internal=True), Effect.PASSES, True),
        (Host(stacked=BRIDGE, fate=Fate.STOPPED, agent=Agent.NONE), NOTHING, ALLOW, Effect.UNKNOWN, None),
        # A device that was put on the segment after the agent's end is no known interface, so its packets are
        # dropped.
        (
            Host(stacked=BRIDGE, fate=Fate.OBSERVED, agent=Agent.NONE, workers=Workers.NONE),
            NOTHING,
            OBSERVED,
            Effect.UNKNOWN,
            None,
        ),
        (Host(stacked=BRIDGE, fate=Fate.UNCLEAR), NOTHING, ALLOW, Effect.UNKNOWN, None),
        (Host(stacked=BRIDGE, fate=Fate.OBSERVED), NOTHING, OBSERVED, Effect.PASSES, True),
        (Host(ruleset=Ruleset.NOT_PERMITTED), NOTHING, ALLOW, Effect.UNKNOWN, None),
        (Host(agent=Agent.ELSEWHERE, elsewhere="process 7"), NOTHING, ALLOW, Effect.UNKNOWN, None),
        (Host(unclear=True, elsewhere="vni1 is no segment"), cached(Class.DENY), DENY, Effect.UNKNOWN, None),
        (Host(agent=Agent.AWAY, ruleset=Ruleset.NONE, elsewhere="process 7"), NOTHING, DENY, Effect.UNKNOWN, None),
        (Host(agent=Agent.AWAY, ruleset=Ruleset.CLOSED, elsewhere="process 7"), None, DENY, Effect.UNKNOWN, None),
    ],
)
def test_the_effect_follows_from_host_cache_and_policy(
    host: Host, found: CachedState | None, policy: Policy, effect: Effect, as_policy: bool | None
) -> None:
    made = now(host, found, policy)
    assert (made.effect, made.as_policy) == (effect, as_policy)
    assert made.why


@pytest.mark.parametrize("agent", list(Agent))
@pytest.mark.parametrize("loaded", list(Ruleset))
@pytest.mark.parametrize("workers", list(Workers))
@pytest.mark.parametrize("opens", [True, False])
def test_every_state_of_a_host_has_an_answer(agent: Agent, loaded: Ruleset, workers: Workers, opens: bool) -> None:
    host = Host(agent=agent, ruleset=loaded, workers=workers, opens=opens)
    assert handling(host) in Handling
    for policy in (ALLOW, DENY, OBSERVED, LIMITED):
        for found in (None, NOTHING, cached(Class.ALLOW)):
            assert now(host, found, policy).why


@pytest.mark.parametrize(
    ("host", "observed", "place"),
    [
        (Host(), False, Handling.BY_POLICY),
        (Host(), True, Handling.OBSERVES),
        (Host(workers=Workers.PART), False, Handling.PART),
        (Host(workers=Workers.PART), True, Handling.PART),
        (Host(agent=Agent.SILENT), False, Handling.UNWATCHED),
        (Host(agent=Agent.STARTING), False, Handling.UNWATCHED),
        (Host(agent=Agent.NONE), False, Handling.UNWATCHED),
        (Host(agent=Agent.NONE), True, Handling.UNWATCHED),
        (Host(agent=Agent.SILENT, workers=Workers.NONE), False, Handling.UNANSWERED),
    ],
)
def test_only_a_host_whose_agent_reports_is_said_to_enforce(host: Host, observed: bool, place: Handling) -> None:
    assert handling(msgspec.structs.replace(host, observed=observed)) is place


def test_why_names_what_is_missing() -> None:
    assert "no agent runs here, so no worker answers" in now(DOWN, NOTHING, ALLOW).why
    assert "an agent runs, but no worker answers" in now(DEAF, NOTHING, ALLOW).why
    assert "no worker answers it with a reset" in now(DOWN, cached(Class.REFUSED), REJECT).why
    assert 'it passes because on_agent_down = "open" in the ruleset' in now(DOWN_OPEN, NOTHING, DENY).why
    assert "it passes because the segment is only observed" in now(DOWN_OBSERVED, NOTHING, DENY).why
    assert "Operation not permitted" in now(BARE, NOTHING, DENY).why
    assert "NOT ALL QUEUES ARE ANSWERED" in now(Host(workers=Workers.PART), NOTHING, ALLOW).why
    open_ = now(Host(workers=Workers.PART, opens=True), NOTHING, ALLOW).why
    assert "a packet in one of the others is dropped, or passes if no process has bound its queue, see" in open_
    assert "'allow' for 30 s more" in now(Host(), cached(Class.ALLOW), ALLOW).why
    assert (
        "NOT ALL QUEUES ARE ANSWERED"
        in now(Host(agent=Agent.NONE, workers=Workers.PART), NOTHING, ALLOW, TableVerdict(revision=3)).why
    )


@pytest.mark.parametrize(
    ("left", "policy", "effect", "as_policy"),
    [
        (TableVerdict(verdict=Class.ALLOW), ALLOW, Effect.PASSES, True),
        (TableVerdict(verdict=Class.ALLOW), DENY, Effect.PASSES, False),
        (TableVerdict(verdict=Class.ALLOW, waits=True), LIMITED, Effect.DROPPED, False),
        (TableVerdict(verdict=Class.OBSERVED), DENY, Effect.PASSES, False),
        (TableVerdict(verdict=Class.DENY), DENY, Effect.DROPPED, True),
        (TableVerdict(verdict=Class.DENY), ALLOW, Effect.DROPPED, False),
        (TableVerdict(verdict=Class.UNKNOWN), ALLOW, Effect.DROPPED, False),
        (TableVerdict(verdict=Class.REFUSED), REJECT, Effect.REJECTED, True),
        (TableVerdict(), ALLOW, Effect.DROPPED, False),
        (TableVerdict(error="Permission denied"), ALLOW, Effect.UNKNOWN, None),
        (None, ALLOW, Effect.UNKNOWN, None),
    ],
)
@pytest.mark.parametrize("agent", [Agent.NONE, Agent.SILENT, Agent.STARTING])
def test_workers_without_an_agent_go_by_their_table_and_not_by_the_policy(
    agent: Agent, left: TableVerdict | None, policy: Policy, effect: Effect, as_policy: bool | None
) -> None:
    made = now(Host(agent=agent), NOTHING, policy, left)
    assert (made.effect, made.as_policy) == (effect, as_policy)
    if left is None or left.error:
        assert "what a worker makes of it is not known" in made.why
    else:
        assert "by the policy table as it was left, at revision 0" in made.why
        # A process that has bound a queue and hangs drops what waits there, and only an agent finds that out.
        assert "whether the worker answers is not known, because no agent queries it" in made.why
