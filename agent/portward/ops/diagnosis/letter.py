"""The text for the customer: what blocks the mail, what can be done, and that the receiver may still refuse it.
Pure.

The support engineer can paste it as it is. It contains no reason codes and no segments, because these are internal
to the provider.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from portward.base.characters import shown
from portward.config.documents import network_text
from portward.exemptions.lifecycle import ANTI_FRAUD, SELF_SERVICE, State
from portward.i18n.language import Language, marked
from portward.model import Reason, Standing, Workload
from portward.ops.diagnosis.advice import Matter, Step, Way
from portward.ops.diagnosis.facts import Asked, Facts, Machine
from portward.ops.diagnosis.outcome import Blocking
from portward.policy.preset import ExemptionPath, Preset, ReviewQuestion
from portward.policy.reasons import REASONS
from portward.policy.remedy import relay_is_free

# How many machines a heading names; the others are counted.
_NAMED: Final = 10

_ASKED: Final = {
    ReviewQuestion.MAIL_SOFTWARE: marked("which mail software you use"),
    ReviewQuestion.VOLUME: marked("how many messages you send a day"),
    ReviewQuestion.REVERSE_DNS: marked("which name your sending address has in the reverse DNS"),
    ReviewQuestion.AUTHENTICATION: marked("which of SPF, DKIM and DMARC your domain publishes"),
    ReviewQuestion.TERMS: marked("that you accept the terms of use"),
}
# Steps whose sentence depends on nothing else; `_MatterText._step` has the others.
_STEPS: Final = {
    Step.NONE: marked(
        "If your mail does not arrive all the same, please look into the log of your mail server for the "
        "receiving server's answer."
    ),
    Step.STAY_WITHIN_LIMIT: marked("Please spread your mail over more time, or ask us for a higher limit."),
    Step.RELAY: marked("Send your mail through an authenticated relay on port 587: that is never limited."),
    Step.API: marked("Send your mail through the API of a mail provider: that is never limited."),
    Step.SETTLE_ACCOUNT: marked("First, please settle what is due on your account."),
    Step.PAY_INVOICE: marked(
        "An exemption takes a payment history: first, please pay an invoice of this subscription."
    ),
    Step.PUT_RIGHT: marked(
        "Before you ask again, please put right what led to this decision, and contact us where that is not clear."
    ),
    Step.WAIT: marked("Please wait for the decision on your request."),
    Step.RECORD_GRANT: marked("We have to complete our record; you need not do anything for that."),
    Step.VIRTUAL_MACHINE: marked("Send from a virtual machine instead of the platform service."),
    Step.GATEWAY: marked("You need not do anything: please try again later."),
    Step.LOOK: marked(
        "If your mail does not arrive, please look into the log of your mail server, and send us its messages."
    ),
    Step.TELL_SUBSCRIPTION: marked("We have to complete our records; you need not do anything for that."),
}
_WITHIN_LIMIT: Final = marked("An exemption was granted{when}, and connections to {ports} pass within its limit.")
_MAY: Final = marked("By our policy you may open connections to {ports}.")
_TURNED_DOWN: Final = (Reason.DENIED_REJECTED, Reason.DENIED_REVOKED)
_ENDED: Final = marked("Connections to {ports} are blocked, as the exemption ended{when}.")
_NO_DATE: Final = marked(
    "An exemption is granted, but our record of it lacks a date, so it does not count yet and connections to "
    "{ports} are blocked."
)
_NO_RECORD: Final = marked(
    "Our records of this subscription are not complete, so its connections to {ports} are blocked."
)


def letter(preset: Preset, facts: Facts, found: tuple[Matter, ...], say: Language) -> str:
    """The text, in paragraphs with a blank line between them."""
    parts = [say("Hello,"), _opening(preset, facts, say)]
    if facts.behind:
        parts.append(say("A change of our records is not in force yet; once it is, this may change."))
    for matter in found:
        text = _MatterText(preset, facts, matter, say)
        first = facts.asked is not None and matter is found[0]
        heading = _heading(matter.machines, facts.asked if first else None, say) if len(found) > 1 else ""
        parts.append("\n".join(filter(None, (heading, " ".join(text.what_is_the_matter())))))
        parts.append("\n".join(text.what_can_be_done()))
    parts.append(
        say(
            "Please note that the receiving provider may still refuse your mail, by rules of its own, also where "
            "nothing is blocked on our side."
        )
    )
    parts.append(say("Kind regards"))
    return "\n\n".join(parts)


def named(
    machines: Iterable[Machine], say: Language, *, asked: Asked | None = None, most: int | None = None
) -> str:
    """The addresses of the machines in one line, at most `most`, without their segments. With `asked`, the first
    one is the address in question."""
    addresses = [network_text(machine.address) for machine in machines]
    if asked is not None:
        addresses[0] = asked.address
    words = [
        address if number == 1 else say("{address} ({n} machines)", address=address, n=say.number(number))
        for address, number in Counter(addresses).items()
    ]
    if most is not None and len(words) > most:
        rest = len(words) - most
        words[most:] = [say.many("{n} more", "{n} more", rest, n=say.number(rest))]
    return say.both(words)


def _opening(preset: Preset, facts: Facts, say: Language) -> str:
    ports = ports_in_words(preset, say)
    if facts.asked is not None:
        return say(
            "You have asked us why your machine {address} cannot send mail straight to the Internet ({ports}). "
            "This is what we have found.",
            address=facts.asked.address,
            ports=ports,
        )
    name = shown(facts.subscription.name) if facts.subscription and facts.subscription.name else str(facts.id)
    return say(
        "You have asked us why your subscription {name} cannot send mail straight to the Internet ({ports}). "
        "This is what we have found.",
        name=name,
        ports=ports,
    )


def ports_in_words(preset: Preset, say: Language) -> str:
    """The policy ports in words: port 25."""
    ports = say.both([str(port) for port in preset.ports])
    return say.many("port {ports}", "ports {ports}", len(preset.ports), ports=ports)


def _heading(machines: tuple[Machine, ...], asked: Asked | None, say: Language) -> str:
    # A prefix stands for several machines, unless one of them is in question.
    wide = [machine for machine in machines if machine.address.num_addresses > 1]
    several = len(machines) > 1 or (bool(wide) and asked is None)
    names = named(machines, say, asked=asked, most=_NAMED)
    return say.many("Machine {machines}:", "Machines {machines}:", 2 if several else 1, machines=names)


class _MatterText:
    """One matter in sentences."""

    def __init__(self, preset: Preset, facts: Facts, matter: Matter, say: Language) -> None:
        self._preset, self._facts, self._matter, self._say = preset, facts, matter, say
        subscription = facts.subscription
        self._offer = None if subscription is None else preset.offer(subscription.offer)

    def what_is_the_matter(self) -> Iterator[str]:
        """Sentences on what is blocked, and why."""
        yield self._matter_itself()
        if self._matter.reason is Reason.DENIED_PAAS and self._turned_down() in _TURNED_DOWN:
            yield self._say(
                REASONS[self._turned_down()].letter,
                ports=ports_in_words(self._preset, self._say),
                when=self._on(self._facts.exemption.decided if self._facts.exemption else None),
            )
        yield from self._decision()
        yield from self._limit()
        yield from self._now()
        if self._matter.observed and self._matter.outcome is Blocking.AS_POLICY:
            yield self._say(
                "For the time being these connections pass all the same, since the rule is only observed for you; "
                "what follows counts once it is enforced."
            )

    def _now(self) -> Iterator[str]:
        """The effect at this moment, if it differs from the policy."""
        found, passes = self._matter.outcome, self._matter.reason.allows or self._matter.observed
        if found is Blocking.AS_POLICY:
            return
        if self._matter.observed:
            yield self._say(
                "For the time being the rule is only observed for you, so these connections should pass; what "
                "follows counts once it is enforced."
            )
        if found is Blocking.SHUT:
            yield self._say(
                "At this moment they may be dropped all the same. That is a fault on our side, and nothing "
                "that you have done; we are working on it."
            )
        elif found is Blocking.UNKNOWN and passes:
            yield self._say("Whether they pass at this moment, we could not see.")
        elif found is Blocking.UNKNOWN:
            yield self._say("That is our policy; whether it is in force at this moment, we could not see.")
        elif found is Blocking.OPEN:
            yield self._say(
                "At this moment these connections may pass all the same, since our block is not in force; what "
                "follows counts once it is."
            )

    def what_can_be_done(self) -> Iterator[str]:
        """A line for each way; a list if there are several."""
        ways = [" ".join(self._way(way)) for way in self._matter.ways]
        if len(ways) == 1:
            yield ways[0]
            return
        yield self._say("Your options:")
        yield from (f"- {way}" for way in ways)

    def _matter_itself(self) -> str:
        exemption, reason = self._facts.exemption, self._matter.reason
        text, at = REASONS[reason].letter, exemption.decided if exemption else None
        if reason is Reason.DENIED_UNKNOWN_SOURCE and self._facts.asked is None:
            text = _NO_RECORD
        elif reason is Reason.DENIED_RESTART_REQUIRED and Step.RECORD_GRANT in self._matter.ways[0]:
            text = _NO_DATE
        elif reason is Reason.DENIED_PENDING:
            at = exemption.requested if exemption else None
        elif reason is Reason.DENIED_NOT_EXEMPT and self._facts.state is State.EXPIRED:
            text, at = _ENDED, exemption.until if exemption else None
        elif reason.allows and self._matter.outcome is not Blocking.AS_POLICY:
            text = _MAY
        elif reason is Reason.ALLOWED_EXEMPT and exemption is not None and exemption.limit is not None:
            text = _WITHIN_LIMIT
        ports = ports_in_words(self._preset, self._say)
        return self._say(text, ports=ports, title=self._title(), when=self._on(at))

    def _turned_down(self) -> Reason:
        """The matter's reason. For a platform service, the reason for virtual machines, which the customer should
        use."""
        paas = self._matter.reason is Reason.DENIED_PAAS
        return self._facts.reason_of_machines(self._preset) if paas else self._matter.reason

    def _decision(self) -> Iterator[str]:
        """The reason that was recorded with a rejection or revocation. The note of an anti-fraud check is only for
        the provider."""
        say, exemption = self._say, self._facts.exemption
        if exemption is None or self._turned_down() not in _TURNED_DOWN:
            return
        if exemption.by == ANTI_FRAUD:
            yield say("It did not pass the check that we make of each request.")
        elif exemption.reason:
            own = exemption.by == SELF_SERVICE
            yield say(
                "The reason: {reason}.",
                reason=say(exemption.reason) if own else say.quoted(" ".join(exemption.reason.split())),
            )

    def _limit(self) -> Iterator[str]:
        say, exemption, matter = self._say, self._facts.exemption, self._matter
        if matter.reason is not Reason.ALLOWED_EXEMPT or exemption is None or exemption.limit is None:
            return
        yield say.many(
            "The exemption has a limit: {n} new connection a minute, and {burst} at once, for all machines "
            "of the subscription together.",
            "The exemption has a limit: {n} new connections a minute, and {burst} at once, for all machines "
            "of the subscription together.",
            exemption.limit.per_minute,
            n=say.number(exemption.limit.per_minute),
            burst=say.number(exemption.limit.burst),
        )
        if matter.beyond_limit:
            yield say.many(
                "Lately {n} attempt beyond it was dropped.",
                "Lately {n} attempts beyond it were dropped.",
                matter.beyond_limit,
                n=say.number(matter.beyond_limit),
            )

    def _way(self, way: Way) -> Iterator[str]:
        for step in way:
            yield from self._step(step)

    def _step(self, step: Step) -> Iterator[str]:
        say = self._say
        match step:
            case Step.SETTLE_ACCOUNT if self._standing() is Standing.DISABLED:
                yield say("Please contact us about your account, so that it can be put in order.")
            case Step.ASK_SELF_SERVICE:
                yield say("Ask for an exemption yourself: it is decided at once.")
                yield from self._requires()
            case Step.ASK_REVIEW:
                yield from self._review()
            case Step.RESTART:
                yield say("Please {restart}.", restart=say(self._preset.restart))
                yield self._to_be_restarted()
            case Step.RESTART_AFTER_GRANT:
                yield say(
                    "After the grant, please {restart}: only then does the exemption count for a machine.",
                    restart=say(self._preset.restart),
                )
            case Step.OTHER_SUBSCRIPTION:
                yield say("Use another kind of subscription for your mail.")
                yield from self._others()
            case Step.TELL_SUBSCRIPTION if self._facts.asked:
                yield say(
                    "Please give us the name or the number of the subscription that this machine belongs to."
                )
            case _:
                yield say(_STEPS[step])

    def _review(self) -> Iterator[str]:
        say = self._say
        request = say(self._preset.request) if self._preset.request else say("write to us")
        yield say("To ask for an exemption, please {request}.", request=request)
        why = (
            say("why your mail cannot go through an authenticated relay")
            if relay_is_free(self._preset)
            else say("why your mail has to go out directly")
        )
        asks = () if self._offer is None else self._offer.asks
        yield say("Please let us know {things}.", things=say.both([why, *(say(_ASKED[asked]) for asked in asks)]))
        yield from self._requires()

    def _requires(self) -> Iterator[str]:
        if self._offer is not None and self._offer.requires:
            things = "; ".join(self._say(text) for text in self._offer.requires)
            yield self._say("Conditions: {things}.", things=things)

    def _others(self) -> Iterator[str]:
        """The kinds of subscription that may send, and those that may ask for an exemption."""
        say = self._say
        for sentence, paths in (
            (marked("Without an exemption: {offers}."), (ExemptionPath.NOT_NEEDED,)),
            (marked("With an exemption: {offers}."), (ExemptionPath.SELF_SERVICE, ExemptionPath.REVIEW)),
        ):
            titles = [say(offer.title) for offer in self._preset.offers if offer.exemption in paths]
            if titles:
                yield say(sentence, offers="; ".join(titles))

    def _to_be_restarted(self) -> str:
        """The addresses of all machines to restart, because each must be; only their number if it is every one of
        many."""
        say, machines = self._say, self._matter.machines
        virtual = [machine for machine in self._facts.machines if machine.workload is Workload.VM]
        if len(machines) > _NAMED and len(machines) >= len(virtual):
            return say(
                "Please do this with all {n} virtual machines of the subscription.",
                n=say.number(len(machines)),
            )
        return say("Please do this with: {machines}.", machines=named(machines, say))

    def _title(self) -> str:
        """The kind of subscription, if the preset has several."""
        if self._offer is None or not self._preset.offers or self._offer is self._preset.otherwise:
            return ""
        return f" ({self._say(self._offer.title)})"

    def _on(self, at: datetime | None) -> str:
        return self._say(" on {day}", day=self._say.day(at)) if at else ""

    def _standing(self) -> Standing | None:
        return self._facts.subscription.standing if self._facts.subscription else None
