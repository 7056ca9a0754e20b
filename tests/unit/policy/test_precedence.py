"""If several conditions hold, the first in the list of the policy page decides.

Each test makes facts for an expected reason. It makes one condition true and all conditions before it on the page
false, and draws everything else at random.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portward.model import (
    Address,
    Attachment,
    Exemption,
    ExemptionState,
    Mode,
    Reason,
    Standing,
    Subscription,
    Workload,
)
from portward.policy import presets
from portward.policy.decide import decide, rule_text
from portward.policy.preset import ExemptionPath, Offer

settings.register_profile("policy", deadline=None)  # a busy machine must not make a test fail
settings.load_profile("policy")

NOW = datetime(2026, 6, 1, tzinfo=UTC)
TICK = timedelta(microseconds=1)
IN_FORCE = date(2017, 11, 15)
OWNER = UUID("11111111-0000-4000-8000-000000000002")
PRESET = presets.load("azure-2020")

# The table of the policy page, by column.
ALWAYS = ["enterprise-agreement"]
ON_REQUEST = ["pay-as-you-go", "csp", "microsoft-partner-network", "bizspark-plus", "azure-sponsorship"]
NEVER = [
    "msdn", "azure-pass", "azure-in-open", "azure-for-education", "azure-for-students", "visual-studio",
    "free-trial",
]  # fmt: skip
UNHEARD_OF = ["account", "", "Pay-As-You-Go"]

internet: st.SearchStrategy[Address | None] = st.sampled_from(
    [None, *map(ip_address, ("203.0.113.25", "11.0.0.0", "172.32.0.1", "100.128.0.1", "2001:db8::25", "::2"))]
)
internal: st.SearchStrategy[Address] = st.sampled_from(
    [
        *map(ip_address, ("10.255.255.255", "172.31.0.1", "192.168.7.7", "100.127.255.255", "169.254.0.1")),
        *map(ip_address, ("127.0.0.53", "224.0.0.251", "fd00::1", "fe80::1", "::1", "ff02::1")),
    ]
)
instants = st.datetimes(datetime(2017, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
any_exemption = st.none() | st.builds(
    Exemption,
    subscription=st.just(OWNER),
    state=st.sampled_from(ExemptionState),
    decided=st.none() | instants,
    until=st.none() | instants,
    justification=st.text(max_size=5),
)
old = st.dates(date(2008, 1, 1), IN_FORCE - timedelta(days=1)) | st.just(IN_FORCE - timedelta(days=1))
new = st.dates(IN_FORCE, date(2026, 6, 1)) | st.just(IN_FORCE)
any_offer = st.sampled_from(ALWAYS + ON_REQUEST + NEVER + UNHEARD_OF)


any_created = old | new
in_use = st.sampled_from([Standing.GOOD, Standing.PAST_DUE])
machine = st.just(Workload.VM)
any_start = st.none() | instants


def subscriptions(offer: Any = any_offer, created: Any = any_created, standing: Any = in_use) -> Any:
    """Subscriptions, with random values in all fields that must never matter."""
    return st.builds(
        Subscription,
        id=st.just(OWNER),
        offer=offer,
        created=created,
        standing=standing,
        name=st.text(max_size=5),
        payment_history=st.booleans(),
        mode=st.sampled_from(Mode),
    )


def attachments(workload: Any = machine, started: Any = any_start) -> Any:
    """Attachments of the subscription."""
    return st.builds(
        Attachment,
        segment=st.just("vni1001"),
        address=st.sampled_from([ip_network("10.0.0.4"), ip_network("2001:db8:1::/64")]),
        subscription=st.just(OWNER),
        workload=workload,
        started=started,
    )


def granted(decided: Any, until: Any = None) -> Exemption:
    """A granted exemption."""
    return Exemption(subscription=OWNER, state=ExemptionState.GRANTED, decided=decided, until=until)


def reason(
    subscription: Subscription | None,
    exemption: Exemption | None,
    attachment: Attachment | None,
    destination: Address | None = None,
    now: datetime = NOW,
) -> Reason:
    """The reason that decide() gives. Also checks that the verdict and the sentence agree with it."""
    facts: dict[str, Any] = {"subscription": subscription, "exemption": exemption, "attachment": attachment}
    decision = decide(PRESET, **facts, now=now, destination=destination)
    assert decision.allows is decision.reason.name.startswith("ALLOWED")
    assert decision == decide(PRESET, **facts, now=now, destination=destination)
    assert rule_text(PRESET, decision.reason, **facts).startswith("azure-2020: ")
    return decision.reason


any_workload = st.sampled_from(Workload)
any_standing = st.sampled_from(Standing)


@given(
    st.none() | subscriptions(standing=any_standing),
    any_exemption,
    st.none() | attachments(any_workload),
    internal,
)
def test_an_internal_destination_is_allowed_whoever_sends(
    subscription: Any, exemption: Any, attachment: Any, destination: Address
) -> None:
    assert reason(subscription, exemption, attachment, destination) == Reason.ALLOWED_INTERNAL


@given(subscriptions(standing=any_standing), any_exemption, attachments(any_workload), internet, st.integers(1, 3))
def test_a_source_without_subscription_or_attachment_is_unknown(
    subscription: Any, exemption: Any, attachment: Any, destination: Any, missing: int
) -> None:
    found = reason(
        None if missing & 1 else subscription, exemption, None if missing & 2 else attachment, destination
    )
    assert found == Reason.DENIED_UNKNOWN_SOURCE


@given(subscriptions(standing=st.just(Standing.DISABLED)), any_exemption, attachments(any_workload), internet)
def test_disabled_comes_before_offer_date_exemption_and_workload(
    subscription: Any, exemption: Any, attachment: Any, destination: Any
) -> None:
    assert reason(subscription, exemption, attachment, destination) == Reason.DENIED_DISABLED


@given(subscriptions(), any_exemption, attachments(st.just(Workload.PAAS)), internet)
def test_paas_comes_before_offer_date_and_exemption(
    subscription: Any, exemption: Any, attachment: Any, destination: Any
) -> None:
    assert reason(subscription, exemption, attachment, destination) == Reason.DENIED_PAAS


@given(subscriptions(st.sampled_from(ALWAYS)), any_exemption, attachments(), internet)
def test_an_offer_that_is_always_allowed_needs_no_date_and_no_exemption(
    subscription: Any, exemption: Any, attachment: Any, destination: Any
) -> None:
    assert reason(subscription, exemption, attachment, destination) == Reason.ALLOWED_OFFER


@given(subscriptions(st.sampled_from(ON_REQUEST + NEVER), old), any_exemption, attachments(), internet)
def test_created_before_the_date_comes_before_never_and_before_a_revocation(
    subscription: Any, exemption: Any, attachment: Any, destination: Any
) -> None:
    assert reason(subscription, exemption, attachment, destination) == Reason.ALLOWED_GRANDFATHERED


@given(
    subscriptions(st.sampled_from(NEVER), new) | subscriptions(st.sampled_from(UNHEARD_OF)),
    any_exemption,
    attachments(),
    internet,
)
def test_an_offer_that_can_never_be_exempt_ignores_every_exemption(
    subscription: Any, exemption: Any, attachment: Any, destination: Any
) -> None:
    assert reason(subscription, exemption, attachment, destination) == Reason.DENIED_INELIGIBLE


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (None, Reason.DENIED_NOT_EXEMPT),
        (ExemptionState.REQUESTED, Reason.DENIED_PENDING),
        (ExemptionState.REJECTED, Reason.DENIED_REJECTED),
        (ExemptionState.REVOKED, Reason.DENIED_REVOKED),
    ],
)
@given(
    subscription=subscriptions(st.sampled_from(ON_REQUEST), new),
    attachment=attachments(),
    destination=internet,
    decided=st.none() | instants,
    until=st.none() | instants,
)
def test_the_state_of_the_exemption_comes_before_any_restart(
    state: Any, expected: Reason, subscription: Any, attachment: Any, destination: Any, decided: Any, until: Any
) -> None:
    exemption = None if state is None else Exemption(
        subscription=OWNER, state=state, decided=decided, until=until
    )  # fmt: skip
    assert reason(subscription, exemption, attachment, destination) == expected


@given(
    subscriptions(st.sampled_from(ON_REQUEST), new),
    attachments(),
    st.none() | instants,
    st.timedeltas(timedelta(0), timedelta(days=900)) | st.just(timedelta(0)),
)
def test_a_grant_that_has_ended_is_none_restarted_or_not(
    subscription: Any, attachment: Any, decided: Any, ago: timedelta
) -> None:
    assert reason(subscription, granted(decided, NOW - ago), attachment) == Reason.DENIED_NOT_EXEMPT


in_force = st.none() | st.timedeltas(TICK, timedelta(days=900)).map(lambda ahead: NOW + ahead)


@given(
    subscriptions(st.sampled_from(ON_REQUEST), new),
    attachments(started=st.none()),
    instants,
    in_force,
    st.none() | st.timedeltas(timedelta(0), timedelta(days=900)) | st.just(timedelta(0)),
)
def test_a_grant_waits_for_a_start_after_it(
    subscription: Any, attachment: Any, decided: datetime, until: Any, before: timedelta | None
) -> None:
    started = None if before is None else decided - before
    attachment = msgspec.structs.replace(attachment, started=started)
    found = reason(subscription, granted(decided, until), attachment)
    assert found == Reason.DENIED_RESTART_REQUIRED


@given(
    subscriptions(st.sampled_from(ON_REQUEST), new),
    attachments(),
    instants,
    in_force,
    st.timedeltas(TICK, timedelta(days=900)) | st.just(TICK),
)
def test_a_grant_counts_from_the_first_start_after_it(
    subscription: Any, attachment: Any, decided: datetime, until: Any, after: timedelta
) -> None:
    """The start counts only from its own time on. If a fast clock has recorded it in the future, the machine must
    wait until then."""
    attachment = msgspec.structs.replace(attachment, started=decided + after)
    come = decided + after <= NOW
    expected = Reason.ALLOWED_EXEMPT if come else Reason.DENIED_RESTART_REQUIRED
    assert reason(subscription, granted(decided, until), attachment) == expected


@given(subscriptions(st.sampled_from(ON_REQUEST), new), attachments(started=instants), in_force)
def test_a_grant_of_unknown_time_counts_for_no_start(subscription: Any, attachment: Any, until: Any) -> None:
    assert reason(subscription, granted(None, until), attachment) == Reason.DENIED_RESTART_REQUIRED


@given(subscriptions(standing=any_standing), any_exemption, attachments(any_workload))
def test_no_destination_stands_for_any_on_the_internet(subscription: Any, exemption: Any, attachment: Any) -> None:
    somewhere = ip_address("203.0.113.25")
    assert reason(subscription, exemption, attachment) == reason(subscription, exemption, attachment, somewhere)


@given(
    subscriptions(standing=any_standing),
    any_exemption,
    attachments(any_workload),
    st.text(max_size=5),
    st.booleans(),
    st.sampled_from(Mode),
)
def test_name_payment_history_and_mode_decide_nothing(
    subscription: Any, exemption: Any, attachment: Any, name: str, paid: bool, mode: Mode
) -> None:
    other = msgspec.structs.replace(subscription, name=name, payment_history=paid, mode=mode)
    assert reason(subscription, exemption, attachment) == reason(other, exemption, attachment)


def test_a_grant_ends_at_its_instant() -> None:
    payg = Subscription(id=OWNER, offer="pay-as-you-go", created=date(2020, 1, 1))
    machine = Attachment(segment="v", address=ip_network("10.0.0.4"), subscription=OWNER, started=NOW - 2 * TICK)
    grant = granted(NOW - timedelta(days=30), until=NOW)
    assert reason(payg, grant, machine, now=NOW - TICK) == Reason.ALLOWED_EXEMPT
    assert reason(payg, grant, machine, now=NOW) == Reason.DENIED_NOT_EXEMPT


def test_an_ipv4_mapped_destination_is_an_ipv6_one() -> None:
    # On the wire ::ffff:10.0.0.1 is an IPv6 packet, which the kernel compares with the IPv6 prefixes only.
    assert reason(None, None, None, IPv4Address("10.0.0.1")) == Reason.ALLOWED_INTERNAL
    assert reason(None, None, None, IPv6Address("::ffff:10.0.0.1")) == Reason.DENIED_UNKNOWN_SOURCE


def test_always_allowed_comes_before_the_date() -> None:
    both = Offer(ids=("x",), title="X", exemption=ExemptionPath.NOT_NEEDED, created_before=date(2030, 1, 1))
    preset = msgspec.structs.replace(PRESET, offers=(both,))
    subscription = Subscription(id=OWNER, offer="x", created=date(2020, 1, 1))
    machine = Attachment(segment="v", address=ip_network("10.0.0.4"), subscription=OWNER)
    found = decide(preset, subscription=subscription, exemption=None, attachment=machine, now=NOW)
    assert found.reason == Reason.ALLOWED_OFFER
