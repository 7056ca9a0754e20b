"""The text for a customer is true for the preset, and names a next step."""

from __future__ import annotations

from datetime import date
from uuid import UUID

import pytest

from portward.i18n.catalogues import language
from portward.i18n.language import ENGLISH
from portward.model import Reason, Subscription
from portward.policy import presets
from portward.policy.remedy import reason_text, remedy

AZURE = presets.load("azure-2020")
DENIED = [reason for reason in Reason if not reason.allows]
ALLOWED = [reason for reason in Reason if reason.allows]


def of(offer: str) -> Subscription:
    """A subscription of an offer."""
    return Subscription(id=UUID(int=1), offer=offer, created=date(2024, 1, 1))


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_words_of_its_own(reason: Reason) -> None:
    assert [other for other in Reason if reason_text(other) == reason_text(reason)] == [reason]


@pytest.mark.parametrize("name", presets.bundled())
@pytest.mark.parametrize("reason", list(Reason))
def test_every_preset_has_a_remedy_in_one_line(name: str, reason: Reason) -> None:
    for subscription in (None, of("pay-as-you-go"), of("no-such-offer")):
        text = remedy(presets.load(name), reason, subscription)
        assert text.endswith(".")
        assert "\n" not in text


@pytest.mark.parametrize("reason", ALLOWED)
def test_an_allowed_customer_reads_that_the_receiver_may_still_refuse(reason: Reason) -> None:
    assert "receiving provider may still refuse" in remedy(AZURE, reason, of("enterprise-agreement"))


@pytest.mark.parametrize("reason", DENIED)
def test_who_may_not_send_is_promised_nothing(reason: Reason) -> None:
    assert "Nothing is blocked" not in remedy(AZURE, reason, of("free-trial"))


@pytest.mark.parametrize(
    "reason", [Reason.DENIED_NOT_EXEMPT, Reason.DENIED_INELIGIBLE, Reason.DENIED_PAAS, Reason.DENIED_REVOKED,
               Reason.DENIED_REJECTED, Reason.DENIED_PENDING],
)  # fmt: skip
def test_the_relay_is_named_where_its_port_is_free_and_nowhere_else(reason: Reason) -> None:
    assert "relay on port 587" in remedy(AZURE, reason, of("csp"))
    assert "587" not in remedy(presets.load("scaleway"), reason, of("account"))


@pytest.mark.parametrize("name", presets.bundled())
@pytest.mark.parametrize("reason", DENIED)
def test_no_preset_recommends_a_port_that_it_enforces(name: str, reason: Reason) -> None:
    preset = presets.load(name)
    for id_ in ("no-such-offer", *(id_ for offer in preset.offers for id_ in offer.ids)):
        for say in (ENGLISH, language("fr")):
            promised = say("Send through an authenticated relay on port 587, which is never limited")
            assert 587 not in preset.ports or promised not in remedy(preset, reason, of(id_), say)


@pytest.mark.parametrize(
    ("offer", "reason", "part"),
    [
        ("pay-as-you-go", Reason.DENIED_NOT_EXEMPT, "ask for an exemption yourself"),
        ("pay-as-you-go", Reason.DENIED_NOT_EXEMPT, "a payment history"),
        ("azure-sponsorship", Reason.DENIED_NOT_EXEMPT, "Cannot send email (SMTP/Port 25)"),
        ("azure-sponsorship", Reason.DENIED_REJECTED, "ask again: open a support request"),
        ("azure-for-students", Reason.DENIED_INELIGIBLE, "another kind of subscription"),
        ("csp", Reason.DENIED_PENDING, "wait for the decision"),
        ("csp", Reason.DENIED_RESTART_REQUIRED, "stop the virtual machine and start it again"),
        ("csp", Reason.DENIED_DISABLED, "Contact the provider about the account"),
        ("csp", Reason.DENIED_REVOKED, "why this one was revoked"),
        ("csp", Reason.DENIED_PAAS, "from a virtual machine"),
    ],
)
def test_the_way_on_is_that_of_the_offer(offer: str, reason: Reason, part: str) -> None:
    assert part in remedy(AZURE, reason, of(offer))


def test_each_preset_restarts_in_its_own_words() -> None:
    text = remedy(presets.load("azure-2023"), Reason.DENIED_RESTART_REQUIRED, of("ea-dev-test"))
    assert "stop the virtual machine, de-allocate it, and start it again" in text


def test_if_no_offer_may_send_no_other_subscription_is_offered() -> None:
    text = remedy(presets.load("google"), Reason.DENIED_INELIGIBLE, of("project"))
    assert "another kind" not in text
    assert "relay on port 587" in text
