"""Gathers the facts of a diagnosis: the account, from the running agent's table or from the store; what the kernel
dropped recently; what the agents have counted; what happens on this host now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from portward.base.instance import command
from portward.config.documents import brief
from portward.config.keys import Config
from portward.daemon.runtime import in_another_network
from portward.daemon.settings import settings
from portward.errors import PortwardError
from portward.i18n.language import Language
from portward.model import Address, Mode, Network, Reason
from portward.ops import host, sources
from portward.ops.diagnosis import agent_counts, recent_drops, suggestion
from portward.ops.diagnosis.accounts import Accounts, Matched, accounts
from portward.ops.diagnosis.answer import Diagnosis, diagnosis
from portward.ops.diagnosis.facts import Asked, Facts, FactSource, Kernel, Machine
from portward.ops.diagnosis.host_view import HostView
from portward.ops.effect import Handling, Policy
from portward.ops.segment_interfaces import in_a_group
from portward.ops.sources import Named
from portward.policy.decide import decide
from portward.policy.preset import Preset
from portward.store.lookup import SubscriptionRecords, uuid_of

# How many subscriptions of the same name an error lists.
_CANDIDATES: Final = 10
# If segments are handled differently, `here` is the first of these.
_WORST: Final = (
    Handling.UNKNOWN, Handling.CLOSED, Handling.OPEN, Handling.UNANSWERED, Handling.UNWATCHED, Handling.PART,
    Handling.UNANSWERED_OPEN, Handling.STACKED, Handling.BY_POLICY, Handling.OBSERVES,
)  # fmt: skip


def diagnose(path: Path, who: str, address: str | None, say: Language) -> tuple[Preset, Diagnosis]:
    """The diagnosis of the subscription `who` (UUID or name), or of the owner of the source `address` in the
    segment `who`; and the preset in force. Raises InputError for an invalid address or segment, PortwardError if
    no subscription is found, or several have the name."""
    config, preset, remarks = settings(path)
    named = None if address is None else sources.source(config, path, who, address)
    sight = HostView(config)
    with closing(accounts(config, preset)) as place:
        facts = (
            _of_account(config, preset, place, sight, who)
            if named is None
            else _of_source(config, preset, place, sight, named)
        )
    # After `place` is closed, because a process can have the table open only once, and `_seen` opens it.
    facts = _seen(config, sight, facts, None if named is None else named.address)
    remarks = (*remarks, *_of_groups(config, named, facts))
    behind = (host.not_taken_in(facts.behind),) if facts.behind else ()
    return preset, replace(diagnosis(preset, facts, say), remarks=(*remarks, *behind))


def _of_groups(config: Config, named: Named | None, facts: Facts) -> Iterator[str]:
    """The remarks on interfaces of groups that stand in the place of their group."""
    if named is not None and (remark := named.remark()):
        yield remark
    for segment in dict.fromkeys(machine.segment for machine in facts.machines):
        if line := in_a_group(config, segment):
            yield f"{line}; its attachments do nothing on this gateway"


def machines_of(
    config: Config, preset: Preset, place: Accounts, held: SubscriptionRecords, matched: Matched | None = None
) -> tuple[Machine, ...]:
    """The account's machines with their reasons at the time `place.at`; the machine of `matched` first."""
    mode = held.subscription.mode if held.subscription else Mode.ENFORCE
    found = [
        Machine(
            segment=one.segment,
            address=one.address,
            reason=decide(
                preset,
                subscription=held.subscription,
                exemption=held.exemption,
                attachment=one,
                now=place.at,
            ).reason,
            workload=one.workload,
            started=one.started,
            observed=mode is Mode.OBSERVE or config.observes(one.segment),
        )
        for one in held.attachments
    ]
    if matched is not None:
        found.sort(key=lambda one: (one.segment, one.address) != (matched.segment, matched.prefix))
    return tuple(found)


def _of_account(config: Config, preset: Preset, place: Accounts, sight: HostView, who: str) -> Facts:
    held = _the_one(config, place, who)
    return _facts(config, preset, place, sight, held)


def _of_source(config: Config, preset: Preset, place: Accounts, sight: HostView, named: Named) -> Facts:
    segment, address = named.segment, named.address
    asked = Asked(segment, str(address))
    matched = place.matched(segment, address)
    if matched is not None:
        held = place.found(str(matched.subscription))
        if held:
            return replace(_facts(config, preset, place, sight, held[0], matched), asked=asked)
    away = in_another_network(config.table) is not None
    indexes = sight.indexes(segment)
    drops, answer = (None, Kernel.AWAY) if away else recent_drops.of_unknown_subscription(indexes, address)
    return replace(_bare(config, preset, place), asked=asked, nobody=drops, kernel=answer)


def _facts(
    config: Config,
    preset: Preset,
    place: Accounts,
    sight: HostView,
    held: SubscriptionRecords,
    matched: Matched | None = None,
) -> Facts:
    machines = machines_of(config, preset, place, held, matched)

    def owner(segment: str, address: Address) -> Network | None:
        found = place.matched(segment, address)
        return None if found is None else found.prefix

    away = in_another_network(config.table) is not None
    machines, answer = (
        (machines, Kernel.AWAY) if away else (recent_drops.with_drops(machines, owner, sight.indexes))
    )
    metrics, since_start = agent_counts.since_start(config, held.id)
    return replace(
        _bare(config, preset, place),
        id=held.id,
        subscription=held.subscription,
        exemption=held.exemption,
        machines=machines,
        kernel=answer,
        metrics=metrics,
        since_start=since_start,
    )


def _seen(config: Config, sight: HostView, facts: Facts, source: Address | None) -> Facts:
    """The facts with what happens on this host now to each machine, or to a source of an unknown subscription."""
    segments = [machine.segment for machine in facts.machines]
    if facts.asked is not None and source is not None and not segments:
        segments, observed = [facts.asked.segment], config.observes(facts.asked.segment)
        now, outcome = sight.source(facts.asked.segment, source, Policy(verdict="deny", observed=observed))
        facts = replace(facts, now=now, outcome=outcome, observed=observed)
    limited = facts.exemption is not None and facts.exemption.limit is not None
    machines = tuple(
        sight.met(
            machine,
            limited=limited and machine.reason is Reason.ALLOWED_EXEMPT,
            source=source if number == 0 else None,
        )
        for number, machine in enumerate(facts.machines)
    )
    places = sight.places(segments)
    return replace(
        facts,
        machines=machines,
        here=min(places.values(), key=_WORST.index, default=None),
        places=places,
        stacked=sight.stacked(segments),
        elsewhere=sight.elsewhere(segments),
        behind=host.behind_store(config) if facts.place is FactSource.TABLE else "",
    )


def _bare(config: Config, preset: Preset, place: Accounts) -> Facts:
    """The facts that do not depend on the account."""
    return Facts(
        at=place.at,
        place=place.place,
        revision=place.revision,
        preset=preset.name,
        other_preset=place.other_preset,
        remembered=config.verdicts.deny_seconds,
    )


def _the_one(config: Config, place: Accounts, who: str) -> SubscriptionRecords:
    """The account with this UUID or name. Raises PortwardError if there is none, or several."""
    found = place.found(who) if who.strip() else []
    if len(found) == 1:
        return found[0]
    if found:
        raise PortwardError(
            f"{brief(who)} is the name of {len(found)} subscriptions: {_candidates(found)}; "
            f"say which one: `{command('diagnose UUID')}`"
        )
    what = "with this id" if uuid_of(who) else "with exactly this name"
    raise PortwardError(
        f"{brief(who)}: no subscription {what} in the {place.place.value} at revision {place.revision}; "
        f"{suggestion.hint(config, place, who)}"
    )


def _candidates(found: Sequence[SubscriptionRecords]) -> str:
    listed = [
        f"{one.id} ({one.subscription.offer}, created {one.subscription.created})"
        for one in sorted(found, key=lambda one: one.id)[:_CANDIDATES]
        if one.subscription is not None
    ]
    more = [f"and {len(found) - _CANDIDATES} more"] if len(found) > _CANDIDATES else []
    return ", ".join(listed + more)
