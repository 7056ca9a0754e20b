"""The texts: the customer's letter and the support engineer's lines, in both languages."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

import messages
from portward.dataplane.stacking import Fate
from portward.exemptions.lifecycle import ANTI_FRAUD, SELF_SERVICE, Application, Case, request
from portward.i18n.catalogues import FOLDER, language
from portward.i18n.language import ENGLISH, Language
from portward.ipc.mark import Class
from portward.model import Mode, RateLimit, Reason, Standing, Workload
from portward.ops.diagnosis.advice import Step
from portward.ops.diagnosis.answer import LISTED, diagnosis, lines
from portward.ops.diagnosis.facts import Asked, Drops, Kernel
from portward.ops.effect import Handling
from portward.ops.host_state import Agent, CachedState, Host, Ruleset, Workers
from portward.policy import presets
from portward.policy.preset import ReviewQuestion
from portward.policy.remedy import reason_text, remedy
from unit.ops.diagnosis.samples import (
    AFTER,
    BEFORE,
    NOTHING_CACHED,
    NOW,
    REASON,
    State,
    attachment,
    exemption,
    facts,
    subscription,
)

AZURE = presets.load("azure-2020")
FRENCH = language("fr")
BOTH = pytest.mark.parametrize("say", [ENGLISH, FRENCH], ids=lambda say: say.code)
# The customer's letter must not contain these internal words.
INTERNAL = [*(reason.value for reason in Reason), "vni", "paas", "preset", "table", "portward", "{", "}", "None"]


def customer(say: Language, offer: str, state: State, *attachments: object, **more: object) -> str:
    """The customer's text for an account."""
    known = facts(AZURE, subscription(offer), exemption(state, **more), *(attachments or (attachment(),)))  # type: ignore[arg-type]
    return diagnosis(AZURE, known, say).customer


def english_texts() -> list[str]:
    """Every English text of more than two words, with any values in its fields, except texts that are equal in
    both languages."""
    same = {str(text.id) for text in messages.catalogue_of(CATALOGUE) if text.id == text.string}
    texts = [one for text in messages.collected() for one in ([text.id] if isinstance(text.id, str) else text.id)]
    pieces = [piece.strip() for text in texts if text not in same for piece in re.split(r"\{\w+\}", text)]
    return [piece for piece in pieces if len(re.findall(r"[a-z]{2,}", piece)) > 2]


CATALOGUE = FOLDER / "fr" / "LC_MESSAGES" / "portward.po"
ENGLISH_TEXTS = english_texts()


@pytest.mark.parametrize("name", presets.bundled())
@BOTH
def test_a_relay_is_recommended_only_if_its_port_is_not_enforced(name: str, say: Language) -> None:
    preset = presets.load(name)
    recommended = say("Send your mail through an authenticated relay on port 587: that is never limited.")
    found = set()
    for offer, state in itertools.product([offer.ids[0] for offer in preset.offers] + ["another-offer"], State):
        known = facts(preset, subscription(offer), exemption(state), attachment(started=AFTER))
        found.add(recommended in diagnosis(preset, known, say).customer)
    assert (True in found) is (587 not in preset.ports)


@pytest.mark.parametrize("name", presets.bundled())
@BOTH
def test_every_case_has_a_text_without_internal_words_and_in_one_language(name: str, say: Language) -> None:
    preset = presets.load(name)
    offers = [offer.ids[0] for offer in preset.offers] + ["another-offer"]
    for offer, state, workload, standing, started in itertools.product(
        offers, State, Workload, Standing, (BEFORE, AFTER)
    ):
        owner = subscription(offer, standing=standing, payment_history=started == AFTER)
        known = facts(
            preset,
            owner,
            exemption(state, limit=RateLimit(per_minute=30) if state is State.GRANTED else None),
            attachment(started=started, workload=workload),
            attachment("10.0.0.9", AFTER),
            observed=standing is Standing.PAST_DUE,
        )
        made = diagnosis(preset, known, say)
        for word in INTERNAL:
            assert word not in made.customer, (word, made.customer)
        receiver = "may still refuse your mail" if say is ENGLISH else "peut refuser vos messages"
        assert receiver in made.customer
        assert "  " not in made.customer
        if say is FRENCH:
            printed = "\n".join(lines(preset, made, say))
            assert not [text for text in ENGLISH_TEXTS if text in printed], printed


@BOTH
@pytest.mark.parametrize("reason", Reason)
def test_reasons_and_remedies_are_said_in_the_language(say: Language, reason: Reason) -> None:
    for name, offer in itertools.product(presets.bundled(), ("csp", "azure-sponsorship", "free-trial", "x")):
        printed = remedy(presets.load(name), reason, subscription(offer), say) + reason_text(reason, say)
        assert "{" not in printed
        if say is FRENCH:
            assert not [text for text in ENGLISH_TEXTS if text in printed], printed


@pytest.mark.parametrize(
    ("offer", "state", "parts"),
    [
        ("enterprise-agreement", State.NONE, ["Nothing is blocked here", "receiving server's answer"]),
        ("csp", State.NONE, ["none has been asked for", "port 587", "decided at once", "a payment history"]),
        ("azure-sponsorship", State.NONE, ["please open a support request: type Technical", "cannot go through"]),
        ("csp", State.REQUESTED, ["You asked for an exemption on 8 January 2026", "wait for the decision"]),
        ("csp", State.GRANTED, ["granted on 9 January 2026", "stop the virtual machine", "with: 10.0.0.4."]),
        ("csp", State.REJECTED, ["rejected on 9 January 2026", f"“{REASON}”", "put right"]),
        ("csp", State.REVOKED, ["revoked on 9 January 2026", f"“{REASON}”", "put right"]),
        ("csp", State.EXPIRED, ["the exemption ended on 31 May 2026", "decided at once"]),
        ("free-trial", State.NONE, ["never be exempt", "Free Trial", "another kind of subscription",
                                    "Without an exemption: Enterprise Agreement.", "With an exemption: Pay-As"]),
    ],
)  # fmt: skip
def test_the_letter_says_the_reason_and_the_next_step(offer: str, state: State, parts: list[str]) -> None:
    letter = customer(ENGLISH, offer, state)
    for part in parts:
        assert part in letter
    assert letter.startswith("Hello,\n\nYou have asked us why your subscription fabrikam cannot")


def test_a_review_says_what_it_asks() -> None:
    offers = tuple(
        offer
        if offer.ids[0] != "microsoft-partner-network"
        else msgspec_replace(offer, asks=tuple(ReviewQuestion))
        for offer in AZURE.offers
    )
    preset = msgspec_replace(AZURE, offers=offers)
    known = facts(preset, subscription("azure-sponsorship"), None, attachment())
    for say, parts in (
        (ENGLISH, ["which mail software", "messages you send a day", "reverse DNS", "SPF, DKIM", "terms of use"]),
        (
            FRENCH,
            ["quel logiciel", "messages vous envoyez par jour", "DNS inverse", "SPF, DKIM", "conditions d’ut"],
        ),
    ):
        letter = diagnosis(preset, known, say).customer
        assert all(part in letter for part in parts), letter


def test_what_self_service_records_is_said_in_the_customers_language() -> None:
    for owner in (
        subscription("csp", standing=Standing.PAST_DUE),
        subscription("csp", payment_history=False),
    ):
        record = request(Case(AZURE, owner, None, NOW), Application(), by="x")
        assert record.by == SELF_SERVICE
        letter = diagnosis(AZURE, facts(AZURE, owner, record, attachment()), FRENCH).customer
        assert "renouvelez la demande" in letter
        assert record.reason not in letter


def test_what_an_anti_fraud_check_noted_is_not_for_the_customer() -> None:
    letter = customer(ENGLISH, "azure-sponsorship", State.REJECTED, by=ANTI_FRAUD, reason="sender of a botnet")
    assert "botnet" not in letter
    assert "did not pass the check" in letter


def test_the_letter_names_the_limit_and_the_drops_beyond_it() -> None:
    granted = exemption(State.GRANTED, limit=RateLimit(per_minute=1200, burst=5))
    known = facts(AZURE, subscription("csp"), granted, attachment(started=AFTER))
    machine = msgspec_replace(known.machines[0], drops=Drops(beyond_limit=3, sources=1))
    known = msgspec_replace(known, machines=(machine,))
    made = diagnosis(AZURE, known, ENGLISH)
    assert "1,200 new connections a minute, and 5 at once" in made.customer
    assert "Lately 3 attempts beyond it were dropped." in made.customer
    assert any("3 connections dropped beyond the limit" in line for line in lines(AZURE, made, ENGLISH))


def test_an_observed_customer_reads_that_mail_still_passes() -> None:
    owner = subscription("csp", mode=Mode.OBSERVE)
    made = diagnosis(AZURE, facts(AZURE, owner, None, attachment(), observed=True), ENGLISH)
    assert "pass all the same" in made.customer
    assert made.matters[0].observed


def test_what_only_passed_as_observed_is_not_listed_as_dropped() -> None:
    owner = subscription("csp", mode=Mode.OBSERVE)
    known = facts(AZURE, owner, None, attachment(), observed=True)
    machine = msgspec_replace(known.machines[0], drops=Drops(observed=7, sources=1))
    known = msgspec_replace(known, machines=(machine,))
    printed = [line.strip() for line in lines(AZURE, diagnosis(AZURE, known, ENGLISH), ENGLISH)]
    (passed,) = [line for line in printed if "7 packets passed as observed, in the last" in line]
    assert passed.startswith("not dropped")
    (dropped,) = [line for line in printed if line.startswith("dropped")]
    assert "nothing in the last" in dropped


def test_the_source_that_was_asked_about_comes_first_and_marked() -> None:
    known = facts(
        AZURE, subscription("csp"), exemption(State.GRANTED), attachment("10.0.2.0/24", AFTER), attachment(),
        asked=Asked("vni1002", "10.0.2.9"),
    )  # fmt: skip
    made = diagnosis(AZURE, known, ENGLISH)
    assert [matter.reason for matter in made.matters] == [Reason.ALLOWED_EXEMPT, Reason.DENIED_RESTART_REQUIRED]
    assert "your machine 10.0.2.9 cannot send" in made.customer
    assert "Machine 10.0.2.9:\nNothing is blocked here" in made.customer
    (marked,) = [line for line in lines(AZURE, made, ENGLISH) if line.startswith("  →")]
    assert "vni1002 10.0.2.0/24" in marked


@BOTH
def test_an_unknown_source_is_said_to_be_unknown(say: Language) -> None:
    known = facts(AZURE, None, None, id=None, asked=Asked("vni1002", "10.0.0.9"), nobody=Drops(nobody=True))
    printed = list(lines(AZURE, diagnosis(AZURE, known, say), say))
    assert ("unknown source" if say is ENGLISH else "source inconnue") in printed[0]
    assert any(("yes, just now" if say is ENGLISH else "oui, en ce moment") in line for line in printed)
    assert any("10.0.0.9" in line for line in printed[5:])


def many(number: int) -> tuple[list[str], list[str], str]:
    """The lines for an account with this number of machines, short and whole, and the customer's text."""
    machines = [attachment(f"10.0.{n // 250}.{n % 250 + 1}", BEFORE if n % 2 else AFTER) for n in range(number)]
    made = diagnosis(AZURE, facts(AZURE, subscription("csp"), exemption(State.GRANTED), *machines), ENGLISH)
    short, whole = (list(lines(AZURE, made, ENGLISH, listed=listed)) for listed in (LISTED, None))
    return short, whole, made.customer


def test_hundreds_of_machines_are_counted_and_those_that_need_something_listed_first() -> None:
    short, whole, letter = many(600)
    assert any("600 machines: 300 may send, 300 may not" in line for line in short)
    assert any("300 × an exemption is granted, but" in line for line in short)
    listed = [line for line in short if " vni1002 " in line]
    assert len(listed) == LISTED
    assert all("needs a restart" in line for line in listed)
    assert any("and 580 more: --all" in line for line in short)
    assert sum(" vni1002 " in line for line in whole) == 600
    assert not any("--all" in line for line in whole)
    # The letter must name each machine that needs a restart.
    assert sum(f"10.0.{n // 250}.{n % 250 + 1}" in letter for n in range(1, 600, 2)) == 300


def test_where_all_of_many_machines_are_to_be_restarted_their_number_is_enough() -> None:
    machines = [attachment(f"10.0.0.{n}") for n in range(1, 100)]
    letter = customer(ENGLISH, "csp", State.GRANTED, *machines)
    assert "with all 99 virtual machines of the subscription" in letter
    assert len(letter) < 1_000


def test_the_same_address_in_two_segments_is_shown_as_two_machines() -> None:
    letter = customer(ENGLISH, "csp", State.GRANTED, attachment(), attachment(segment="vni1003"))
    assert "with: 10.0.0.4 (2 machines)." in letter


@pytest.mark.parametrize("kernel", [Kernel.NO_INTERFACE, Kernel.NO_RULESET, Kernel.NOT_PERMITTED, Kernel.AWAY])
@BOTH
def test_what_is_not_known_is_said(kernel: Kernel, say: Language) -> None:
    known = facts(AZURE, subscription("csp"), None, attachment(), kernel=kernel)
    printed = "\n".join(lines(AZURE, diagnosis(AZURE, known, say), say))
    assert {"en": "not known", "fr": "inconnu"}[say.code] in printed


def msgspec_replace(value: Any, **fields: Any) -> Any:
    """A frozen value with other fields."""
    from msgspec.structs import replace

    return replace(value, **fields)


# --- what this gateway does now ---

ALLOWED, DENIED = "enterprise-agreement", "pay-as-you-go"


OPENED = Host(ruleset=Ruleset.NONE)
DOWN = Host(agent=Agent.NONE, workers=Workers.NONE)
DOWN_OPEN = Host(agent=Agent.NONE, workers=Workers.NONE, opens=True)
CLOSED = Host(agent=Agent.NONE, ruleset=Ruleset.CLOSED)
BRIDGED = Host(stacked=("bridge br9 takes the packets of segment vni1002",), fate=Fate.STOPPED)
UNCLEAR = Host(stacked=("macvlan mv9 takes the packets of segment vni1002",), fate=Fate.UNCLEAR)
PART, PART_OPEN = Host(workers=Workers.PART), Host(workers=Workers.PART, opens=True)
LEFT = Host(agent=Agent.NONE)
SILENT = Host(agent=Agent.SILENT)
USER = Host(ruleset=Ruleset.NOT_PERMITTED)
ELSEWHERE = Host(agent=Agent.ELSEWHERE, elsewhere="process 7")
CACHED_ALLOW = CachedState(verdict=Class.ALLOW, expires=30.0)
CACHED_DENY = CachedState(verdict=Class.DENY, expires=30.0)
NOTHING = "Nothing is blocked here: connections to {ports} pass."
PASSING = (
    "At this moment these connections may pass all the same, since our block is not in force; what follows counts "
    "once it is."
)
FAULT = (
    "At this moment they may be dropped all the same. That is a fault on our side, and nothing that you have "
    "done; we are working on it."
)
NOT_SEEN = "Whether they pass at this moment, we could not see."
NOT_SEEN_BLOCKED = "That is our policy; whether it is in force at this moment, we could not see."
STACKED = "other devices take the packets of these segments before they are classified: see STACKED"


def texts(
    say: Language,
    offer: str,
    host: Host,
    found: CachedState | None = NOTHING_CACHED,
    address: str = "10.0.0.4",
    **more: Any,
) -> tuple[str, str]:
    """The lines for the support engineer, and the customer's text."""
    known = facts(AZURE, subscription(offer), None, attachment(address), host=host, found=found, **more)
    made = diagnosis(AZURE, known, say)
    return "\n".join(lines(AZURE, made, say)), made.customer


def _dropped(say: Language, host: Host, found: CachedState) -> str:
    """The lines for the support engineer, if the kernel counts nothing for the machine."""
    known = facts(AZURE, subscription(ALLOWED), None, attachment(), host=host, found=found)
    machines = tuple(msgspec_replace(machine, drops=Drops()) for machine in known.machines)
    return "\n".join(lines(AZURE, diagnosis(AZURE, msgspec_replace(known, machines=machines), say), say))


@BOTH
@pytest.mark.parametrize(
    ("host", "found", "address"),
    [
        (OPENED, NOTHING_CACHED, "10.0.0.4"),
        (OPENED, NOTHING_CACHED, "10.0.0.0/28"),
        (DOWN_OPEN, NOTHING_CACHED, "10.0.0.4"),
        (DOWN_OPEN, CACHED_DENY, "10.0.0.4"),  # it ends
        (PART_OPEN, NOTHING_CACHED, "10.0.0.4"),
        # Revoked after the agent had ended.
        (LEFT, CACHED_ALLOW, "10.0.0.4"),
        (DOWN, CACHED_ALLOW, "10.0.0.4"),
    ],
)
def test_a_denied_customer_is_not_said_to_be_blocked_while_his_mail_passes(
    say: Language, host: Host, found: CachedState, address: str
) -> None:
    engineer, text = texts(say, DENIED, host, found, address)
    assert say(PASSING) in text
    assert f"  {say('now')} " in engineer
    assert say("MAY PASS NOW all the same") in engineer
    assert say(PASSING) not in texts(say, ALLOWED, host, found, address)[1]
    assert say(PASSING) not in texts(say, DENIED, Host())[1]


@BOTH
@pytest.mark.parametrize(
    ("host", "found"),
    [
        (CLOSED, NOTHING_CACHED),
        (DOWN, NOTHING_CACHED),
        (DOWN, CACHED_ALLOW),  # it ends
        (LEFT, CACHED_DENY),
        (PART, NOTHING_CACHED),
        (BRIDGED, NOTHING_CACHED),
        (BRIDGED, CACHED_ALLOW),
    ],
)
def test_an_allowed_customer_hears_that_the_gateway_drops(say: Language, host: Host, found: CachedState) -> None:
    engineer, text = texts(say, ALLOWED, host, found)
    assert say(NOTHING, ports=say("port {ports}", ports=25)) not in text
    assert say(FAULT) in text
    assert say("You need not do anything: please try again later.") in text
    assert say("packets that are dropped in spite of the policy are not counted by source") in _dropped(
        say, host, found
    )
    drops = say("provider: this gateway drops what the policy allows, see `{status}`", status="portward status")
    assert drops in engineer
    assert say("this gateway enforces the policy") not in engineer
    assert say("nothing is blocked: look for the receiving server's answer") not in engineer
    assert say("You need not do anything: please try again later.") not in texts(say, DENIED, host)[1]


@BOTH
@pytest.mark.parametrize("host", [LEFT, SILENT, UNCLEAR, USER, ELSEWHERE])
@pytest.mark.parametrize("found", [NOTHING_CACHED, None])
def test_the_letter_does_not_state_the_unknown_as_a_fact(
    say: Language, host: Host, found: CachedState | None
) -> None:
    engineer, text = texts(say, ALLOWED, host, found)
    assert say(NOT_SEEN) in text
    assert say(NOTHING, ports=say("port {ports}", ports=25)) not in text
    assert say("this gateway enforces the policy") not in engineer
    assert say("nothing is blocked: look for the receiving server's answer") not in engineer
    assert say(NOT_SEEN_BLOCKED) in texts(say, DENIED, host, found)[1]


@BOTH
def test_of_a_segment_that_is_not_here_only_the_policy_is_said(say: Language) -> None:
    engineer, text = texts(say, DENIED, Host(), None)
    assert say("not known: no segment in question is an interface of this host now") in engineer
    assert say(NOT_SEEN_BLOCKED) in text


@BOTH
def test_who_enforces_in_place_of_an_agent_on_this_table_is_named(say: Language) -> None:
    engineer, _ = texts(say, DENIED, ELSEWHERE, elsewhere="process 7")
    assert say("not known: {why}", why="process 7") in engineer
    assert "CAP_NET_ADMIN" not in engineer
    assert "CAP_NET_ADMIN" in texts(say, DENIED, USER)[0]


@BOTH
def test_why_it_is_not_known_is_said_of_that_segment(say: Language) -> None:
    places = {"vni1001": Handling.BY_POLICY, "vni1002": Handling.UNKNOWN}
    why = "the ruleset has vni1002 among those that are no segments"
    engineer, _ = texts(say, DENIED, ELSEWHERE, places=places, here=Handling.UNKNOWN, elsewhere=why)
    assert f"vni1001: {say('this gateway enforces the policy')}" in engineer
    assert f"vni1002: {say('not known: {why}', why=why)}" in engineer


@BOTH
def test_who_is_only_observed_is_not_said_to_pass_while_he_is_dropped(say: Language) -> None:
    """Only the subscription is observed, which the kernel does not know."""
    passing = say(
        "For the time being these connections pass all the same, since the rule is only observed for you; what "
        "follows counts once it is enforced."
    )
    observed = say("only observed: its packets pass")
    engineer, text = texts(say, DENIED, Host(), observed=True)
    assert passing in text
    assert observed in engineer
    for host in (DOWN, CLOSED, BRIDGED, LEFT, USER):
        engineer, text = texts(say, DENIED, host, observed=True)
        assert passing not in text
        assert observed not in engineer


@BOTH
def test_who_is_only_observed_reads_that_no_policy_blocks_him(say: Language) -> None:
    """If workers are down or bridges take the packets, the gateway drops them."""
    should_pass = say(
        "For the time being the rule is only observed for you, so these connections should pass; what follows "
        "counts once it is enforced."
    )
    for host in (DOWN, CLOSED, BRIDGED):
        _, text = texts(say, DENIED, host, observed=True)
        assert should_pass in text
        assert say(FAULT) in text
    for host in (LEFT, USER):
        _, text = texts(say, DENIED, host, observed=True)
        assert should_pass in text
        assert say(NOT_SEEN) in text
        assert say(NOT_SEEN_BLOCKED) not in text
    for host in (Host(), DOWN, LEFT):
        assert should_pass not in texts(say, DENIED, host)[1]
    assert should_pass not in texts(say, DENIED, Host(), observed=True)[1]


@BOTH
def test_machines_with_different_handling_are_listed_apart(say: Language) -> None:
    """Packets of machines on a segment with a bridge on it are dropped. Those of other machines pass."""
    owner = subscription(ALLOWED)
    bridged = facts(AZURE, owner, None, attachment("10.0.0.4"), host=BRIDGED)
    passing = facts(AZURE, owner, None, attachment("10.0.0.9", segment="vni1003"))
    known = msgspec_replace(
        passing, machines=(*passing.machines, *bridged.machines), places={**bridged.places, **passing.places}
    )
    made = diagnosis(AZURE, known, say)
    assert [matter.ways for matter in made.matters] == [((Step.GATEWAY,),), ((Step.NONE,),)]
    dropped, passes = made.customer.index("10.0.0.4"), made.customer.index("10.0.0.9")
    assert dropped < made.customer.index(say(FAULT)) < passes
    engineer = "\n".join(lines(AZURE, made, say))
    assert f"vni1003: {say('this gateway enforces the policy')}" in engineer
    assert f"vni1002: {say(STACKED)}" in engineer


@BOTH
def test_the_letter_says_that_a_change_of_the_records_is_not_in_force(say: Language) -> None:
    held = say("A change of our records is not in force yet; once it is, this may change.")
    assert held in texts(say, DENIED, Host(), behind="the store is at revision 17")[1]
    assert held not in texts(say, DENIED, Host())[1]


@BOTH
def test_a_gateway_that_only_observes_is_said_to(say: Language) -> None:
    places: dict[str, Any] = {"here": Handling.OBSERVES, "places": {"vni1002": Handling.OBSERVES}}
    engineer, _ = texts(say, DENIED, Host(), observed=True, **places)
    assert say("this gateway enforces the policy") not in engineer
    assert say("this gateway only observes these segments: their packets pass, whoever sends them") in engineer


@BOTH
def test_a_limit_is_part_of_what_passes(say: Language) -> None:
    granted = {"limit": RateLimit(per_minute=777), "by": "ada"}
    text = customer(say, DENIED, State.GRANTED, attachment(started=AFTER), **granted)
    assert "{" not in text
    assert "777" in text
    assert (
        say("Nothing is blocked here: an exemption was granted{when}, and connections to {ports} pass.")[:12]
        not in text
    )
    known = facts(
        AZURE, subscription(DENIED), exemption(State.REVOKED, limit=RateLimit(per_minute=777)), attachment()
    )
    assert "777" not in "\n".join(lines(AZURE, diagnosis(AZURE, known, say), say))
