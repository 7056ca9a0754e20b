"""Decides what happens to a source's next packet to the Internet on this host, and why. Pure.

The policy says what should happen. Something else may happen if no agent runs, if the ruleset is missing, or if an
older verdict is cached. So both are reported, separately.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from portward.base.instance import command
from portward.base.interfaces import shown
from portward.dataplane.names import COUNTED_SETS
from portward.dataplane.stacking import Fate
from portward.ipc import mark
from portward.ipc.mark import Class
from portward.ops.host_state import Agent, CachedState, Host, Ruleset, TableVerdict, Workers


class Effect(StrEnum):
    """The fate of the packet. LIMITED: new connections pass within the rate limit of the subscription."""

    PASSES = "passes"
    LIMITED = "limited"
    DROPPED = "dropped"
    REJECTED = "rejected"
    UNKNOWN = "unknown"


class Handling(StrEnum):
    """How this host handles packets of sources without a cached verdict.

    UNWATCHED: workers have bound the queues, but no running agent says whether they answer, or under which policy.
    """

    BY_POLICY = "judges"
    OBSERVES = "observes"  # every packet passes, and its verdict is only counted
    PART = "part"  # by policy, but dropped if no worker answers the packet's queue
    UNWATCHED = "unwatched"
    STACKED = "stacked"  # other devices take the packets before portward sees them
    OPEN = "open"  # every packet passes
    CLOSED = "closed"  # every packet is dropped
    UNANSWERED = "nobody-answers"  # dropped
    UNANSWERED_OPEN = "nobody-answers-open"  # passes
    UNKNOWN = "unknown"


class Now(msgspec.Struct, frozen=True):
    """The effect now, and why. `as_policy`: whether the policy says the same; None if the effect is unknown."""

    effect: Effect
    why: str
    as_policy: bool | None = True


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """The policy for the source: the verdict (`allow`, `deny` or `reject`), whether it is only observed, whether
    it has a rate limit, and whether the destination is internal."""

    verdict: str
    observed: bool = False
    limited: bool = False
    internal: bool = False


def handling(host: Host) -> Handling:
    """How this host handles packets of sources without a cached verdict."""
    if host.agent is Agent.AWAY or host.unclear:
        return Handling.UNKNOWN
    if host.ruleset is Ruleset.NOT_PERMITTED:
        return Handling.UNKNOWN
    if host.ruleset is Ruleset.CLOSED:
        return Handling.CLOSED
    if host.ruleset is Ruleset.NONE:
        return Handling.OPEN
    if host.agent is Agent.ELSEWHERE:
        return Handling.UNKNOWN
    if host.stacked:
        return Handling.STACKED
    if host.workers in (Workers.ANSWER, Workers.PART):
        return _answered(host)
    if host.workers is Workers.NONE and host.opens:
        return Handling.UNANSWERED_OPEN
    return Handling.UNANSWERED


def _answered(host: Host) -> Handling:
    if host.agent is not Agent.RUNS:
        return Handling.UNWATCHED
    if host.workers is Workers.PART:
        return Handling.PART
    return Handling.OBSERVES if host.observed else Handling.BY_POLICY


def now(host: Host, found: CachedState | None, policy: Policy, left: TableVerdict | None = None) -> Now:
    """The effect on the next packet of a source.

    `found` is what the kernel has cached for it; None if its segment is not an interface here now. `left` is what
    workers find in the table while no agent runs or reports; the policy may have changed since.
    """
    made = _now(host, found, policy, left)
    passes = policy.verdict == "allow" or policy.observed
    if made.effect is Effect.UNKNOWN:
        return msgspec.structs.replace(made, as_policy=None)
    as_policy = (made.effect in (Effect.PASSES, Effect.LIMITED)) is passes
    return msgspec.structs.replace(made, as_policy=as_policy)


def lasts(how: Handling, made: Now) -> bool:
    """Whether a source goes on passing although no worker answers, because the kernel has its rate limit, and only
    an agent removes that."""
    return made.effect is Effect.LIMITED and how in (
        Handling.UNANSWERED,
        Handling.UNANSWERED_OPEN,
        Handling.UNWATCHED,
    )


def _now(host: Host, found: CachedState | None, policy: Policy, left: TableVerdict | None) -> Now:
    how = handling(host)
    match how:
        case Handling.UNKNOWN if host.elsewhere:
            return Now(Effect.UNKNOWN, host.elsewhere)
        case Handling.UNKNOWN:
            return Now(Effect.UNKNOWN, "asking the kernel needs root or CAP_NET_ADMIN")
        case Handling.CLOSED:
            return Now(Effect.DROPPED, f"{_CLOSED} (see `{command('rules show')}`)")
        case Handling.OPEN:
            error = f" ({host.ruleset_error})" if host.ruleset_error else ""
            return Now(Effect.PASSES, f"{_OPEN}{error}; {_AGENTS[host.agent]}")
    if host.stacked and not policy.internal:
        return _stacked(host)
    if found is None:
        return Now(Effect.UNKNOWN, "its segment has no interface on this host now, so nothing of it comes here")
    if policy.internal:
        return Now(Effect.PASSES, "the destination is internal: no verdict is needed")
    if found.limit:
        return Now(
            Effect.LIMITED,
            f"new connections of its subscription pass within the limit ({found.limit}), those beyond are dropped;"
            f" dropped lately of this source: {found.packets}",
        )
    if found.verdict is not None:
        return _by_cache(host, found, found.verdict)
    if how is Handling.UNWATCHED:
        return _by_left(host, left or TableVerdict(error="the policy table was not asked"))
    return _by_worker(host, how, policy)


def _stacked(host: Host) -> Now:
    why = "; ".join(host.stacked)
    if host.fate not in (Fate.OBSERVED, Fate.STOPPED):
        return Now(Effect.UNKNOWN, why)
    if host.agent is not Agent.RUNS:
        # Only an agent writes such a device into the ruleset, to stop or to pass its packets. The loaded ruleset
        # may still have the device from the last agent.
        return Now(Effect.UNKNOWN, f"{why}; {_AGENTS[host.agent]}, so whether the ruleset has it is not known")
    return Now(Effect.PASSES if host.fate is Fate.OBSERVED else Effect.DROPPED, why)


def _by_cache(host: Host, found: CachedState, verdict: Class) -> Now:
    behind = f" behind {shown(found.interface)}" if found.interface else ""
    why = f"the kernel has cached {COUNTED_SETS[verdict]!r} for {found.expires:.0f} s more{behind}"
    effect = Effect.PASSES if verdict in mark.PASSING else Effect.DROPPED
    if verdict is Class.REFUSED:
        if host.workers in (Workers.NONE, Workers.DEAF):
            return Now(effect, f"{why}, and {_no_worker(host)} it with a reset")
        effect = Effect.REJECTED
    return Now(effect, why if host.agent is Agent.RUNS else f"{why}; {_AGENTS[host.agent]}")


def _by_worker(host: Host, how: Handling, policy: Policy) -> Now:
    if how is Handling.UNANSWERED:
        return Now(Effect.DROPPED, f"nothing is cached for it, and {_no_worker(host)}")
    if how is Handling.UNANSWERED_OPEN:
        because = "the segment is only observed" if host.observed else 'on_agent_down = "open"'
        return Now(
            Effect.PASSES,
            f"nothing is cached for it, and {_no_worker(host)}: it passes because {because} in the ruleset "
            "that is loaded",
        )
    words = f"nothing is cached for it: its next packet asks a worker{_in_part(host)}"
    if policy.verdict == "allow" and policy.limited:
        return Now(Effect.LIMITED, f"{words}, and then the limit counts")
    if policy.verdict == "allow" or policy.observed:
        return Now(Effect.PASSES, words)
    return Now(Effect.REJECTED if policy.verdict == "reject" else Effect.DROPPED, words)


def _by_left(host: Host, left: TableVerdict) -> Now:
    """The effect if a worker answers from the policy table as it is, whatever the store has now."""
    if left.error:
        words = f"nothing is cached for it, and what a worker makes of it is not known: {left.error}"
        return Now(Effect.UNKNOWN, f"{words}; {_AGENTS[host.agent]}")
    words = (
        "nothing is cached for it: its next packet asks a worker, which goes by the policy table as it was left, "
        f"at revision {left.revision} ({_AGENTS[host.agent]}; whether the worker answers is not known, because "
        f"no agent queries it){_in_part(host)}"
    )
    if left.verdict is None:
        return Now(Effect.DROPPED, f"{words}; that table knows no segment behind its interface")
    if left.waits:
        return Now(
            Effect.DROPPED, f"{words}; it may send within a limit, which only an agent writes to the kernel"
        )
    if left.verdict in mark.PASSING:
        return Now(Effect.PASSES, words)
    return Now(Effect.REJECTED if left.verdict is Class.REFUSED else Effect.DROPPED, words)


def _in_part(host: Host) -> str:
    if host.workers is not Workers.PART:
        return ""
    rest = "is dropped, or passes if no process has bound its queue" if host.opens else "is dropped"
    return f". NOT ALL QUEUES ARE ANSWERED: a packet in one of the others {rest}, see `{command('status')}`"


def _no_worker(host: Host) -> str:
    if host.agent in (Agent.RUNS, Agent.SILENT):
        return f"{_AGENTS[host.agent]}, but no worker answers"
    return f"{_AGENTS[host.agent]}, so no worker answers"


_CLOSED = (
    "table inet portward_closed is loaded: no packet to the ports that it names is forwarded, whoever sends it"
)
_OPEN = "no ruleset of portward is loaded here: NOTHING IS ENFORCED and every source may send"
_AGENTS = {
    Agent.RUNS: "an agent runs",
    Agent.STARTING: "the agent is starting",
    Agent.SILENT: "the agent runs and does not report",
    Agent.NONE: "no agent runs here",
    Agent.ELSEWHERE: "another agent enforces here",
    Agent.AWAY: "the agent runs in another network namespace",
    Agent.HIDDEN: "whether an agent runs is not known (only root and the agent's user may see that)",
}
