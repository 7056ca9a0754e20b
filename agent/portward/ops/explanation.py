"""`portward explain`: why a source may or may not send.

While an agent runs, it decides from the table that the workers read. If none runs, or if that table has no policy
yet, it decides from the store; if the store cannot be read, from the table that the last agent wrote. It says
which. If the user may read the kernel (CAP_NET_ADMIN), it also says whether a verdict is cached now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from portward.base.clock import agent_time
from portward.base.instance import command
from portward.base.interfaces import shown
from portward.config.documents import network_text
from portward.config.keys import Config, Refusal
from portward.daemon.runtime import hidden, in_another_network, running
from portward.daemon.settings import settings
from portward.dataplane.names import VERDICT_SETS
from portward.errors import PortwardError, StoreError
from portward.model import Address, Attachment, Exemption, Mode, RateLimit, Reason, Subscription, Workload
from portward.ops import effect, host, sources
from portward.ops.effect import Effect, Handling, Now, Policy
from portward.ops.host_state import CachedState, Ruleset
from portward.ops.segment_interfaces import behind, devices, in_a_group
from portward.ops.sources import Named
from portward.policy.decide import decide, rule_text
from portward.policy.preset import Preset
from portward.policy.remedy import reason_text, remedy
from portward.store.backends import open_store
from portward.store.lookup import find
from portward.table import layout
from portward.table.database import DatabaseError
from portward.table.history import held_history
from portward.table.reader import Reader


class SubscriptionFacts(msgspec.Struct, frozen=True):
    """The records of a source, where they were read, and when everything was last decided."""

    source: str
    revision: int
    attachment: Attachment | None = None
    subscription: Subscription | None = None
    exemption: Exemption | None = None
    decided: datetime | None = None


class Explanation(msgspec.Struct, frozen=True):
    """An answer to "why can't I send mail?".

    It has what the policy says; `now` is what happens on this host now, and why. `kernel` is what the kernel has
    cached for the source, or why that is unknown. `decided_from` begins with `table` or `store`. `remarks` must be
    shown first. `interface` is the interface of a group that was asked about; empty if it was the segment.
    """

    segment: str
    address: str
    destination: str | None
    verdict: str
    reason: str
    reason_in_words: str
    subscription: str | None
    name: str | None
    offer: str | None
    matched: str | None
    rule: str
    revision: int
    decided_from: str
    observed: bool
    kernel: str
    remedy: str
    limit: RateLimit | None = None
    now: Now | None = None
    remarks: tuple[str, ...] = ()
    interface: str = ""


def explain(path: Path, segment: str, address: str, to: str | None) -> Explanation:
    """Explains the source `address` in `segment`, for packets to `to`, or to any address on the Internet. Raises
    InputError for an invalid address or segment, PortwardError if neither table nor store can be read."""
    config, preset, remarks = settings(path)
    named = sources.source(config, path, segment, address)
    source = named.address
    destination = None if to is None else sources.destination(to, source)
    known = _known(config, preset, named.segment, source)
    interfaces = _interfaces(config, named)
    asked = _ask_kernel(interfaces, source)
    kernel = _kernel(segment, asked)
    found = _explanation(config, preset, known, named.segment, source, destination, kernel=kernel)
    handling, now = _now(config, found, source, asked, interfaces)
    remarks = (*remarks, *_of_interface(config, preset, named), *_behind(config))
    found = replace(
        found, now=now, remedy=_remedy(found, handling, now), remarks=remarks, interface=named.interface
    )
    if in_another_network(config.table) is not None:
        return replace(found, kernel="not asked: the agent runs in another network namespace")
    return found


def _interfaces(config: Config, named: Named) -> dict[str, int]:
    """The interfaces here that packets of the source can come from: name → index."""
    found = behind(config, named.segment)
    return {name: index for name, index in found.items() if named.interface in ("", name)}


def _of_interface(config: Config, preset: Preset, named: Named) -> Iterator[str]:
    """The remarks if the operator named an interface of a group."""
    if remark := named.remark():
        yield remark
        if _known(config, preset, named.interface, named.address).attachment is not None:
            yield (
                f"an attachment to {shown(named.interface)} covers {named.address}, and does nothing here: "
                f"{in_a_group(config, named.interface)}"
            )


# With these, a packet may pass now (by a cached verdict, an answered queue, an unwatched worker) and the next one
# be dropped.
_UNSURE: Final = (Handling.UNANSWERED, Handling.PART, Handling.UNWATCHED)


def _remedy(found: Explanation, handling: Handling, now: Now) -> str:
    """The remedy for the customer; a sentence that there is none if only the provider can act."""
    if now.effect is Effect.UNKNOWN:
        if found.verdict != "allow":
            return found.remedy
        return "The policy allows it. Whether this gateway lets it pass now is not known, see `now`."
    if not now.as_policy and now.effect in (Effect.DROPPED, Effect.REJECTED):
        lets = "the policy allows it" if found.verdict == "allow" else "the policy only observes it"
        return f"Nothing: {lets}, and it is this gateway that drops it. See `{command('status')}`."
    if not now.as_policy:
        return f"{found.remedy} At this moment the packets pass all the same, since this gateway lets them."
    unsure = handling in _UNSURE and not effect.lasts(handling, now)
    if found.verdict == "allow" and unsure and found.reason != Reason.ALLOWED_INTERNAL:
        return f"Nothing: the policy allows it. But this gateway may soon drop it, see `{command('status')}`."
    return found.remedy


def _behind(config: Config) -> Iterator[str]:
    """A remark if the store has changes that the agent here has not taken yet."""
    if running(config.table) is not None and (why := host.behind_store(config)):
        yield host.not_taken_in(why)


def lines(found: Explanation) -> Iterator[str]:
    """The explanation as lines for people."""
    to = f" to {found.destination}" if found.destination else ""
    observed = ""
    if found.observed and found.verdict != "allow":
        # An observed packet can still be dropped, for example if no worker answers.
        passes = found.now is None or found.now.effect in (Effect.PASSES, Effect.LIMITED)
        observed = " (observed only: the packet passes)" if passes else " (observed only)"
    behind_it = f" behind {shown(found.interface)}" if found.interface else ""
    yield f"{shown(found.segment)} {found.address}{behind_it}{to}: {found.verdict.upper()}{observed}"
    if found.now is not None:
        as_policy = ", which is NOT what the policy says" if found.now.as_policy is False else ""
        yield f"  now       {_EFFECTS[found.now.effect]}{as_policy}: {found.now.why}"
    yield f"  why       {found.reason_in_words} ({found.reason})"
    if found.subscription:
        name = f"{found.name}, " if found.name else ""
        yield f"  whose     {name}subscription {found.subscription}, offer {found.offer}"
        if found.matched and found.matched != found.address:
            yield f"  matched   {found.matched}"
    else:
        yield "  whose     unknown: no attachment covers this address in this segment"
    yield f"  rule      {found.rule}"
    if found.limit is not None:
        yield f"  limit     {found.limit}, for all sources of the subscription together"
    place, mark, more = found.decided_from.partition(";")
    yield f"  from      the {place}, revision {found.revision}{mark}{more}"
    yield f"  kernel    {found.kernel}"
    yield f"  customer  {found.remedy}"


_EFFECTS: Final = {
    Effect.PASSES: "PASSES here",
    Effect.LIMITED: "PASSES here WITHIN A LIMIT",
    Effect.DROPPED: "DROPPED here",
    Effect.REJECTED: "REJECTED here",
    Effect.UNKNOWN: "NOT KNOWN what happens here",
}


def _known(config: Config, preset: Preset, segment: str, source: Address) -> SubscriptionFacts:
    """The facts from the running agent's table; if none runs, from the store; if that cannot be read, from the
    table that the last agent wrote."""
    if running(config.table) is not None and (found := _from_table(config, preset, segment, source)) is not None:
        return found
    try:
        return _from_store(config, segment, source)
    except StoreError as error:
        with contextlib.suppress(PortwardError, DatabaseError):
            if (found := _from_table(config, preset, segment, source, Reader.open_left)) is not None:
                place = found.source.removeprefix("table")
                return replace(found, source=f"table as an agent left it{place}; {error}")
        raise


def _from_table(
    config: Config,
    preset: Preset,
    segment: str,
    address: Address,
    open_table: Callable[[Path], Reader] = Reader.open,
) -> SubscriptionFacts | None:
    """The facts from the policy table; None if it has no policy yet. Raises TableError."""
    reader = open_table(config.table)
    try:
        head, holding = reader.head(), reader.holding(segment, address)
    finally:
        reader.close()
    if head is None:
        return None
    place = "table"
    if head.preset.hex() != preset.digest:
        place += f" decided by the preset in {config.preset!r} as it is now, which the agent has not taken"
    if head.held:
        place += f"; {_held(head)}"
    if holding is None:
        return SubscriptionFacts(place, head.revision)
    entry, account = holding.entry, holding.account
    attachment = Attachment(
        segment=segment,
        address=holding.prefix,
        subscription=account.id,
        workload=Workload.PAAS if entry.paas else Workload.VM,
        started=layout.instant(entry.started),
    )
    return SubscriptionFacts(
        place, head.revision, attachment, account.subscription, account.exemption, head.decided()
    )


def _held(head: layout.Head) -> str:
    """Which revision of the store is held, and which later denials are nevertheless in force."""
    if held_history(head) is not None:
        return f"the store has another history (a restored backup?), which is held up to its revision {head.held}"
    more = f", and denials up to revision {head.ahead} are in force ahead of it" if head.ahead > head.held else ""
    return f"the store's revision {head.held} is held{more}"


def _from_store(config: Config, segment: str, address: Address) -> SubscriptionFacts:
    store = open_store(config.store)
    try:
        revision, attachment, subscription, exemption = find(store, segment, address)
    finally:
        store.close()
    if hidden(config.table):
        why = "whether an agent runs is not known"
    elif running(config.table) is None:
        why = "no agent runs on this table"  # one may run on another table
    else:
        why = "the agent has no policy yet"  # it is still reading the store
    return SubscriptionFacts(f"store ({why})", revision, attachment, subscription, exemption)


def _explanation(
    config: Config,
    preset: Preset,
    known: SubscriptionFacts,
    segment: str,
    source: Address,
    destination: Address | None,
    *,
    kernel: str,
) -> Explanation:
    # The agent compares ends of grants with the later of wall clock and last decision.
    now = agent_time(known.decided)
    decision = decide(
        preset,
        subscription=known.subscription,
        exemption=known.exemption,
        attachment=known.attachment,
        now=now,
        destination=destination,
    )
    subscription, attachment = known.subscription, known.attachment
    limit = known.exemption.limit if known.exemption and decision.reason is Reason.ALLOWED_EXEMPT else None
    return Explanation(
        segment=segment,
        address=str(source),
        destination=None if destination is None else str(destination),
        verdict="allow" if decision.reason.allows else _refusal(config, subscription),
        reason=decision.reason.value,
        reason_in_words=reason_text(decision.reason),
        subscription=None if subscription is None else str(subscription.id),
        name=None if subscription is None else subscription.name,
        offer=None if subscription is None else subscription.offer,
        matched=None if attachment is None else network_text(attachment.address),
        rule=rule_text(
            preset, decision.reason, subscription=subscription, exemption=known.exemption, attachment=attachment
        ),
        revision=known.revision,
        decided_from=known.source,
        observed=config.observes(segment) or (subscription is not None and subscription.mode is Mode.OBSERVE),
        kernel=kernel,
        remedy=remedy(preset, decision.reason, subscription, limited=limit is not None),
        limit=limit,
    )


def _refusal(config: Config, subscription: Subscription | None) -> str:
    """The verdict of a denied source. Packets of an unknown subscription are always dropped."""
    reject = config.verdicts.refuse_with is Refusal.REJECT and subscription is not None
    return "reject" if reject else "deny"


class _Asked(NamedTuple):
    """The kernel's answer about a source: `cached` as for `host.cached`. `permitted`: this user may ask."""

    cached: CachedState | None
    permitted: bool = True


def _ask_kernel(interfaces: Mapping[str, int], source: Address) -> _Asked:
    try:
        return _Asked(host.cached(interfaces, source))
    except (OSError, PortwardError):
        return _Asked(None, permitted=False)


def _now(
    config: Config, found: Explanation, source: Address, asked: _Asked, interfaces: Mapping[str, int]
) -> tuple[Handling, Now]:
    """How this host handles sources without a cached verdict, and what happens to the source's next packet."""
    state = host.at_interfaces(host.look(config, [found.segment]), devices(), config, interfaces)
    if not asked.permitted:
        state = replace(state, ruleset=Ruleset.NOT_PERMITTED)
    handling = effect.handling(state)
    left = host.left(config, interfaces, source) if handling is Handling.UNWATCHED else None
    return handling, effect.now(
        state,
        asked.cached,
        Policy(
            verdict=found.verdict,
            observed=found.observed,
            limited=found.limit is not None,
            internal=found.reason == Reason.ALLOWED_INTERNAL,
        ),
        left,
    )


def _kernel(segment: str, asked: _Asked) -> str:
    """The kernel's treatment of the source's next packet, in words. `segment` is as the operator named it."""
    cached, permitted = asked
    if not permitted:
        return "not known: asking the kernel needs root or CAP_NET_ADMIN"
    if cached is None:
        return f"there is no interface {shown(segment)} here now"
    behind_it = f", behind {shown(cached.interface)}" if cached.interface else ""
    if not cached.loaded:
        return "has cached nothing: the ruleset that caches is not loaded here"
    if cached.limit:
        return (
            f"lets its subscription open new connections, {cached.limit}; dropped lately of this source: "
            f"{cached.packets}{behind_it}"
        )
    if cached.verdict is None:
        return "has cached nothing for this source"
    packets = f"{cached.packets} packet{'' if cached.packets == 1 else 's'}"
    return (
        f"has cached {VERDICT_SETS[cached.verdict]!r} for {cached.expires:.0f} s more, {packets} so far{behind_it}"
    )
