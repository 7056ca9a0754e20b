"""A diagnosis as one value for programs, and as lines for the support engineer with the customer's text apart.
Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import msgspec

from portward.base.instance import command
from portward.base.interfaces import shown
from portward.config.documents import network_text
from portward.exemptions.lifecycle import State
from portward.i18n.language import Language, marked, marked_many
from portward.model import Exemption, FraudCheck, Mode, Reason, Standing, Subscription, Workload
from portward.ops.diagnosis.advice import Step, Way, in_order, matters
from portward.ops.diagnosis.facts import Drops, Facts, FactSource, Kernel, Machine, Metrics
from portward.ops.diagnosis.letter import letter
from portward.ops.diagnosis.outcome import Blocking
from portward.ops.effect import Handling
from portward.policy.preset import Preset
from portward.policy.remedy import reason_text, remedy

# How many segments a line names.
_SEGMENTS: Final = 5
# How many machines are listed without `--all`, so that the customer's text stays on the screen.
LISTED: Final = 20

_STATES: Final = {
    State.NONE: marked("none asked for"),
    State.REQUESTED: marked("asked for, not decided yet"),
    State.GRANTED: marked("granted"),
    State.REJECTED: marked("rejected"),
    State.REVOKED: marked("revoked"),
    State.EXPIRED: marked("granted, and ended since"),
}
_STANDINGS: Final = {
    Standing.GOOD: marked("in good standing"),
    Standing.PAST_DUE: marked("payment past due"),
    Standing.DISABLED: marked("disabled"),
}
_CHECKS: Final = {
    FraudCheck.PASS: marked("passed"),
    FraudCheck.FAIL: marked("failed"),
    FraudCheck.REFER: marked("a person has to look"),
}
_STEPS: Final = {
    Step.NONE: marked("nothing is blocked: look for the receiving server's answer"),
    Step.STAY_WITHIN_LIMIT: marked("stay within the limit, or have it raised"),
    Step.RELAY: marked("a relay on port 587"),
    Step.API: marked("a mail provider's API"),
    Step.SETTLE_ACCOUNT: marked("put the account in order"),
    Step.PAY_INVOICE: marked("pay a first invoice"),
    Step.PUT_RIGHT: marked("put right what the decision names"),
    Step.ASK_SELF_SERVICE: marked("ask for an exemption by self-service"),
    Step.ASK_REVIEW: marked("ask for an exemption, for review"),
    Step.WAIT: marked("wait for the decision"),
    Step.RESTART: marked("restart the machines"),
    Step.RESTART_AFTER_GRANT: marked("restart the machines after the grant"),
    Step.RECORD_GRANT: marked("provider: record when the exemption was granted, no restart counts before"),
    Step.VIRTUAL_MACHINE: marked("send from a virtual machine"),
    Step.OTHER_SUBSCRIPTION: marked("another kind of subscription"),
    Step.TELL_SUBSCRIPTION: marked("find out whose it is, and add the missing record"),
    Step.GATEWAY: marked("provider: this gateway drops what the policy allows, see `{status}`"),
    Step.LOOK: marked(
        "provider: find out what happens to it, with `portward diagnose SEGMENT ADDRESS` on its gateway"
    ),
}
_PACKETS: Final = (
    marked_many("{n} packet refused", "{n} packets refused"),
    marked_many("{n} connection dropped beyond the limit", "{n} connections dropped beyond the limit"),
)
_OBSERVED: Final = marked_many("{n} packet passed as observed", "{n} packets passed as observed")
_NOT_PERMITTED: Final = marked("not known: asking the kernel needs root or CAP_NET_ADMIN")
_ELSEWHERE: Final = marked("not known: {why}")
_OUTCOMES: Final = {
    Blocking.SHUT: marked("MAY BE DROPPED NOW all the same"),
    Blocking.OPEN: marked("MAY PASS NOW all the same"),
    Blocking.UNKNOWN: marked("not known what happens now"),
}
_KERNEL: Final = {
    Kernel.NO_INTERFACE: marked("not known: no segment of these machines is an interface of this host now"),
    Kernel.NO_RULESET: marked("not known: the ruleset that counts is not loaded here"),
    Kernel.NOT_PERMITTED: _NOT_PERMITTED,
    Kernel.AWAY: marked("not known: the agent runs in another network namespace"),
}
_HERE: Final = {
    Handling.BY_POLICY: marked("this gateway enforces the policy"),
    Handling.OBSERVES: marked("this gateway only observes these segments: their packets pass, whoever sends them"),
    Handling.PART: marked(
        "NOT ALL QUEUES ARE ANSWERED on this gateway: it follows the policy, but some connections are dropped, "
        "allowed or not: see `{status}`"
    ),
    Handling.UNWATCHED: marked(
        "NOT KNOWN: no agent reports on this gateway; its workers, if they answer, follow the policy table as "
        "it was left: see `{status}`"
    ),
    Handling.OPEN: marked("NOTHING IS ENFORCED on this gateway, every source may send: see `{status}`"),
    Handling.CLOSED: marked("this gateway forwards nothing to these ports, whoever sends it: see `{rules}`"),
    Handling.UNANSWERED: marked(
        "NO WORKER ANSWERS on this gateway: sources without a cached verdict are dropped, allowed or not"
    ),
    Handling.UNANSWERED_OPEN: marked(
        "NO WORKER ANSWERS on this gateway: sources of these segments without a cached verdict pass, allowed or "
        "not"
    ),
    Handling.STACKED: marked(
        "other devices take the packets of these segments before they are classified: see STACKED"
    ),
    Handling.UNKNOWN: _NOT_PERMITTED,
}
_METRICS: Final = {
    Metrics.NO_AGENT: marked("earlier drops are not known: no agent on this table reports them"),
    Metrics.OFF: marked("earlier drops are not known: the agent does not count by subscription"),
    Metrics.UNREACHABLE: marked("earlier drops are not known: the agent's metrics cannot be read"),
}


class MatterReport(msgspec.Struct, frozen=True):
    """A matter in codes, with the number of its machines. `observed`: the rule is only observed."""

    reason: Reason
    machines: int
    observed: bool
    ways: tuple[Way, ...]
    outcome: Blocking = Blocking.UNKNOWN


class Diagnosis(msgspec.Struct, frozen=True):
    """The document that `--json` prints.

    `exemption_state` is the state of the exemption at the time of the facts. `customer` is the text for the
    customer, in `language`. `remarks` must be shown first (see `settings`).
    """

    facts: Facts
    exemption_state: State
    matters: tuple[MatterReport, ...]
    language: str
    customer: str
    remarks: tuple[str, ...] = ()


def diagnosis(preset: Preset, facts: Facts, say: Language) -> Diagnosis:
    """The diagnosis that follows from the facts. Machines that need an action come first."""
    facts = _ordered(facts)
    found = matters(preset, facts)
    reports = tuple(
        MatterReport(matter.reason, len(matter.machines), matter.observed, matter.ways, matter.outcome)
        for matter in found
    )
    return Diagnosis(facts, facts.state, reports, say.code, letter(preset, facts, found, say))


def lines(preset: Preset, made: Diagnosis, say: Language, *, listed: int | None = LISTED) -> Iterator[str]:
    """The diagnosis as lines for people: facts, up to `listed` machines (None: all), and the customer's text."""
    rows = [*_rows(preset, made.facts, say, listed), *_next(made.matters, say)]
    width = max(len(label) for label, _ in rows)
    yield _title(preset, made.facts, say)
    for label, text in rows:
        yield f"  {label:<{width}}  {text}".rstrip()
    yield ""
    title = say("text for the customer")
    yield f"──── {title} ────"
    yield ""
    yield from made.customer.splitlines()


def _commands() -> dict[str, str]:
    """The commands that texts name in braces, as they are typed for this agent."""
    return {"status": command("status"), "rules": command("rules show")}


def _ordered(facts: Facts) -> Facts:
    first = facts.machines[0] if facts.asked and facts.machines else None
    return msgspec.structs.replace(facts, machines=in_order(facts.machines, first))


def _title(preset: Preset, facts: Facts, say: Language) -> str:
    asked = f"{facts.asked.segment} {facts.asked.address}: " if facts.asked else ""
    if facts.id is None:
        return asked + say("an unknown source: no attachment covers it")
    if facts.subscription is None:
        return asked + say("subscription {id}, of which there is no record", id=facts.id)
    offer = preset.offer(facts.subscription.offer)
    title = say("unknown to the preset") if offer is None else say(offer.title)
    name = f"{facts.subscription.name}, " if facts.subscription.name else ""
    return asked + name + say(
        "subscription {id}, offer {offer} ({title})", id=facts.id, offer=facts.subscription.offer, title=title
    )  # fmt: skip


def _rows(preset: Preset, facts: Facts, say: Language, listed: int | None) -> Iterator[tuple[str, str]]:
    if facts.subscription is not None:
        yield say("account"), _account(facts, facts.subscription, say)
        for number, text in enumerate(_exemption(facts.state, facts.exemption, say)):
            yield say("exemption") if number == 0 else "", text
    if facts.id is not None:
        yield from _machines(facts, say, listed)
    if facts.subscription is None:
        yield say("record"), remedy(preset, Reason.DENIED_UNKNOWN_SOURCE, None, say)
    for number, text in enumerate(_now(facts, say)):
        yield say("now") if number == 0 else "", text
    yield from (("STACKED", line) for line in facts.stacked)
    for number, text in enumerate(_dropped(facts, say)):
        yield say("dropped") if number == 0 else "", text
    for text in _passed(facts, say):
        yield say("not dropped"), text
    yield say("from"), _source(facts, say)


def _now(facts: Facts, say: Language) -> Iterator[str]:
    """How this host handles these segments; with their names if it handles them differently."""
    unknown = say(_ELSEWHERE, why=facts.elsewhere) if facts.elsewhere else say(_HERE[Handling.UNKNOWN])
    places: dict[Handling, list[str]] = {}
    for segment, place in facts.places.items():
        places.setdefault(place, []).append(shown(segment))
    if not places and facts.elsewhere:
        yield unknown
    elif not places and (facts.machines or facts.asked):
        yield say("not known: no segment in question is an interface of this host now")
    for place, segments in places.items():
        of = f"{', '.join(segments[:_SEGMENTS])}{' …' if len(segments) > _SEGMENTS else ''}: "
        text = unknown if place is Handling.UNKNOWN else say(_HERE[place], **_commands())
        yield f"{of if len(places) > 1 else ''}{text}"


def _account(facts: Facts, subscription: Subscription, say: Language) -> str:
    words = [
        say(_STANDINGS[subscription.standing]),
        say("with a payment history") if subscription.payment_history else say("without a payment history"),
        say("created on {day}", day=say.day(subscription.created)),
    ]
    if subscription.mode is Mode.OBSERVE:
        as_policy = all(machine.outcome is Blocking.AS_POLICY for machine in facts.machines)
        words.append(say("only observed: its packets pass") if as_policy else say("only observed"))
    return ", ".join(words)


def _exemption(state: State, exemption: Exemption | None, say: Language) -> Iterator[str]:
    """The state, its times and who decided; then the reason, the note of the anti-fraud check, and the rate
    limit."""
    words = [say(_STATES[state])]
    if exemption is None:
        yield words[0]
        return
    if exemption.requested:
        words.append(say("asked for on {when}", when=say.time(exemption.requested)))
    if exemption.decided:
        words.append(say("decided on {when}", when=say.time(exemption.decided)))
    if exemption.by:
        words.append(say("by {who}", who=say(exemption.by)))
    if exemption.until:
        words.append(say("until {when}", when=say.time(exemption.until)))
    yield ", ".join(words)
    if exemption.reason:
        yield say("reason: {reason}", reason=" ".join(say(exemption.reason).split()))
    if exemption.fraud_check:
        note = f", {say.quoted(' '.join(exemption.fraud_note.split()))}" if exemption.fraud_note else ""
        yield say("anti-fraud check: {result}{note}", result=say(_CHECKS[exemption.fraud_check]), note=note)
    if exemption.limit and state is State.GRANTED:
        yield say(
            "limit: {n} new connections a minute, {burst} at once",
            n=say.number(exemption.limit.per_minute),
            burst=say.number(exemption.limit.burst),
        )


def _machines(facts: Facts, say: Language, listed: int | None) -> Iterator[tuple[str, str]]:
    machines = facts.machines
    if not machines:
        yield say("machines"), say("none")
        return
    may = sum(machine.reason.allows for machine in machines)
    total = say.many("{n} machine", "{n} machines", len(machines), n=say.number(len(machines)))
    yield (
        say("machines"),
        say("{total}: {may} may send, {may_not} may not", total=total, may=say.number(may),
            may_not=say.number(len(machines) - may)),
    )  # fmt: skip
    for reason, number in Counter(machine.reason for machine in machines).items():
        yield "", f"{say.number(number)} × {reason_text(reason, say)} ({reason.value})"
    listed_ones = machines[:listed]
    same = len({machine.outcome for machine in machines}) == 1
    for number, machine in enumerate(listed_ones):
        line = _machine(machine, facts.kernel, say, doubt=not same)
        yield ("→" if number == 0 and facts.asked else ""), line
    if (rest := len(machines) - len(listed_ones)) > 0:
        yield "", say.many("and {n} more: --all", "and {n} more: --all", rest, n=say.number(rest))


def _machine(machine: Machine, kernel: Kernel, say: Language, *, doubt: bool) -> str:
    as_policy = machine.outcome is Blocking.AS_POLICY
    words = [f"{machine.segment} {network_text(machine.address)}  {machine.reason.value}"]
    if machine.reason is Reason.DENIED_RESTART_REQUIRED:
        words.append(say("needs a restart"))
    if machine.workload is Workload.PAAS:
        words.append(say("platform service"))
    if machine.started:
        words.append(say("last started on {when}", when=say.time(machine.started)))
    else:
        words.append(say("last start unknown"))
    if machine.observed and not machine.reason.allows:
        words.append(say("only observed: its packets pass") if as_policy else say("only observed"))
    if not as_policy and (doubt or machine.outcome is not Blocking.UNKNOWN):
        words.append(say(_OUTCOMES[machine.outcome]))
    if machine.drops is not None:
        words += _packets(machine.drops, say)
    elif kernel is Kernel.ASKED:
        words.append(say("no interface of this host now"))
    return ", ".join(words)


def _packets(drops: Drops, say: Language) -> Iterator[str]:
    yield from _blocked(drops, say)
    if drops.observed:
        yield say.many(*_OBSERVED, drops.observed, n=say.number(drops.observed))


def _blocked(drops: Drops, say: Language) -> Iterator[str]:
    for number, texts in zip((drops.refused, drops.beyond_limit), _PACKETS, strict=True):
        if number:
            yield say.many(*texts, number, n=say.number(number))


def _passed(facts: Facts, say: Language) -> Iterator[str]:
    """Packets that the policy denies, and that passed only because the rule is observed."""
    drops = facts.drops
    if drops is not None and drops.observed:
        packets = say.many(*_OBSERVED, drops.observed, n=say.number(drops.observed))
        yield f"{packets}, {say('in the last {n} s', n=facts.remembered)}"


def _dropped(facts: Facts, say: Language) -> Iterator[str]:
    """Recent drops in the kernel, and the counts of the agents."""
    if facts.id is None:
        yield from _dropped_of_unknown(facts, say)
        return
    drops = facts.drops
    if drops is None and facts.machines:
        yield say(_KERNEL.get(facts.kernel, _KERNEL[Kernel.NO_INTERFACE]))
    elif drops is not None:
        within = say("in the last {n} s", n=facts.remembered)
        packets = list(_blocked(drops, say))
        sources = say.many("of {n} source", "of {n} sources", drops.sources, n=say.number(drops.sources))
        yield f"{', '.join(packets)}, {sources}, {within}" if packets else say("nothing {within}", within=within)
        if any(machine.outcome is Blocking.SHUT for machine in facts.machines):
            yield say("packets that are dropped in spite of the policy are not counted by source")
    if facts.since_start is not None:
        yield say(
            "counted by the agent since {when}, up to {age} s ago: {refused} refused, {beyond} beyond the limit",
            when=say.time(facts.since_start.started),
            age=say.number(facts.since_start.age),
            refused=say.number(facts.since_start.refused),
            beyond=say.number(facts.since_start.beyond_limit),
        )
    elif facts.metrics is not Metrics.READ:
        yield say(_METRICS[facts.metrics])


def _dropped_of_unknown(facts: Facts, say: Language) -> Iterator[str]:
    if facts.nobody is None:
        yield say(_KERNEL.get(facts.kernel, _KERNEL[Kernel.NO_INTERFACE]))
    elif facts.nobody.nobody:
        yield say("yes, just now: packets of unknown sources are dropped, and not counted one by one")
    else:
        yield say("nothing just now")


def _source(facts: Facts, say: Language) -> str:
    at = say.time(facts.at)
    if facts.place is FactSource.TABLE:
        text = say("the running agent's table, revision {n}, {when}", n=facts.revision, when=at)
    else:
        text = say("the store (not the table of a running agent), revision {n}, {when}", n=facts.revision, when=at)
    text += say(", preset {preset}", preset=facts.preset)
    if facts.other_preset:
        text += say(" as it is now, which the agent has not taken")
    return text


def _next(reports: tuple[MatterReport, ...], say: Language) -> Iterator[tuple[str, str]]:
    """The ways to a solution, one in each line, with the reason if there are several matters."""
    first = True
    for matter in reports:
        for way in matter.ways:
            words = say(" → ").join(say(_STEPS[step], **_commands()) for step in way)
            of = f" ({matter.reason.value})" if len(reports) > 1 else ""
            yield say("next step") if first else "", f"{words}{of}"
            first = False
