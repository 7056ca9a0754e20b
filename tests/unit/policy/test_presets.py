"""The bundled presets agree with what their clouds publish."""

from __future__ import annotations

import dataclasses
from datetime import UTC, date, datetime
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import msgspec
import pytest

from portward.model import Attachment, Exemption, ExemptionState, Reason, Subscription, Workload
from portward.policy import presets
from portward.policy.decide import decide
from portward.policy.preset import ExemptionPath, Offer

NOW = datetime(2026, 6, 1, tzinfo=UTC)
OWNER = UUID("11111111-0000-4000-8000-000000000003")
BUNDLED = (
    "akamai", "aws", "azure-2020", "azure-2023", "digitalocean", "google", "hetzner", "oracle", "scaleway",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """The `reason` that a preset gives for an offer. If `granted`, an exemption was granted after the machine's
    last start."""

    preset: str
    offer: str
    created: date
    granted: bool
    paas: bool
    reason: Reason


NEW = date(2026, 1, 1)
CASES = [
    Case("azure-2023", "enterprise-agreement", NEW, False, False, Reason.ALLOWED_OFFER),
    Case("azure-2023", "mca-enterprise", NEW, False, False, Reason.ALLOWED_OFFER),
    Case("azure-2023", "mca-enterprise", NEW, False, True, Reason.DENIED_PAAS),
    Case("azure-2023", "ea-dev-test", date(2010, 1, 1), False, False, Reason.DENIED_NOT_EXEMPT),
    Case("azure-2023", "ea-dev-test", NEW, True, False, Reason.DENIED_RESTART_REQUIRED),
    Case("azure-2023", "pay-as-you-go", date(2010, 1, 1), True, False, Reason.DENIED_INELIGIBLE),
    Case("aws", "account", date(2006, 8, 25), False, False, Reason.DENIED_NOT_EXEMPT),
    Case("aws", "account", NEW, True, False, Reason.ALLOWED_EXEMPT),
    Case("aws", "anything-else", NEW, True, True, Reason.ALLOWED_EXEMPT),
    Case("google", "project", date(2010, 1, 1), True, False, Reason.DENIED_INELIGIBLE),
    Case("digitalocean", "account", date(2012, 1, 1), True, False, Reason.DENIED_INELIGIBLE),
    Case("hetzner", "account", NEW, False, False, Reason.DENIED_NOT_EXEMPT),
    Case("hetzner", "account", NEW, True, False, Reason.ALLOWED_EXEMPT),
    Case("oracle", "tenancy", date(2021, 6, 23), False, False, Reason.ALLOWED_GRANDFATHERED),
    Case("oracle", "tenancy", date(2021, 6, 24), False, False, Reason.DENIED_NOT_EXEMPT),
    Case("oracle", "tenancy", date(2021, 6, 24), True, False, Reason.ALLOWED_EXEMPT),
    Case("akamai", "account", date(2019, 11, 5), False, False, Reason.ALLOWED_GRANDFATHERED),
    Case("akamai", "account", date(2019, 11, 6), False, False, Reason.DENIED_NOT_EXEMPT),
    Case("scaleway", "account", NEW, False, False, Reason.DENIED_NOT_EXEMPT),
    Case("scaleway", "account", NEW, True, True, Reason.ALLOWED_EXEMPT),
]


def test_these_presets_are_bundled() -> None:
    assert presets.bundled() == BUNDLED
    assert presets.DEFAULT in BUNDLED


@pytest.mark.parametrize("name", BUNDLED)
def test_each_preset_has_its_name_its_source_and_its_date(name: str) -> None:
    preset = presets.load(name)
    assert preset.name == name
    assert preset.title
    assert preset.source
    assert date(2020, 1, 1) <= preset.source_date <= date(2026, 12, 31)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_same_prefixes_are_internal_in_each(name: str) -> None:
    # RFC 1918, RFC 6598, RFC 4193, link-local, loopback, multicast.
    want = {
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "169.254.0.0/16",
        "fe80::/10", "127.0.0.0/8", "::1/128", "224.0.0.0/4", "ff00::/8",
    }  # fmt: skip
    assert set(presets.load(name).internal) == {ip_network(prefix) for prefix in want}


@pytest.mark.parametrize(
    ("names", "ports"),
    [
        (("azure-2020", "azure-2023", "aws", "google", "oracle"), (25,)),
        (("hetzner",), (25, 465)),
        (("digitalocean", "akamai", "scaleway"), (25, 465, 587)),
    ],
)
def test_ports(names: tuple[str, ...], ports: tuple[int, ...]) -> None:
    assert {name: presets.load(name).ports for name in names} == dict.fromkeys(names, ports)


def test_only_azure_asks_for_a_restart_and_blocks_platform_services() -> None:
    loaded = [presets.load(name) for name in BUNDLED]
    assert [preset.name for preset in loaded if preset.restart] == ["azure-2020", "azure-2023"]
    assert [preset.name for preset in loaded if preset.paas_blocked] == ["azure-2020", "azure-2023"]
    assert "de-allocate" in presets.load("azure-2023").restart
    assert "de-allocate" not in presets.load("azure-2020").restart


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("aws", ExemptionPath.REVIEW), ("google", ExemptionPath.NEVER), ("hetzner", ExemptionPath.REVIEW),
        ("digitalocean", ExemptionPath.NEVER), ("oracle", ExemptionPath.REVIEW),
        ("akamai", ExemptionPath.REVIEW), ("scaleway", ExemptionPath.SELF_SERVICE),
    ],
)  # fmt: skip
def test_clouds_without_offers_treat_all_alike(name: str, path: ExemptionPath) -> None:
    preset = presets.load(name)
    assert preset.offers == ()
    assert preset.otherwise is not None
    assert preset.otherwise.exemption is path
    assert preset.offer("account") is preset.offer("no-such-offer") is preset.otherwise


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decisions(case: Case) -> None:
    grant = Exemption(subscription=OWNER, state=ExemptionState.GRANTED, decided=datetime(2026, 5, 2, tzinfo=UTC))
    decision = decide(
        presets.load(case.preset),
        subscription=Subscription(id=OWNER, offer=case.offer, created=case.created),
        exemption=grant if case.granted else None,
        attachment=Attachment(
            segment="vlan7",
            address=ip_network("2001:db8::7"),
            subscription=OWNER,
            workload=Workload.PAAS if case.paas else Workload.VM,
            started=datetime(2026, 5, 1, tzinfo=UTC),
        ),
        now=NOW,
    )
    assert decision.reason == case.reason


def test_an_offer_is_found_by_any_of_its_ids_and_else_by_none() -> None:
    preset = presets.load("azure-2020")
    shared = preset.offer("bizspark-plus")
    assert shared is not None
    assert shared.exemption is ExemptionPath.REVIEW
    assert shared is preset.offer("azure-sponsorship")
    assert preset.offer("ea-dev-test") is None


CHANGES: dict[str, Any] = {
    "ports": (25, 587),
    "internal": (ip_network("10.0.0.0/8"),),
    "restart": "",
    "paas_blocked": False,
    "offers": (),
    "otherwise": Offer(title="Any", exemption=ExemptionPath.NEVER),
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_digest_is_another_one_for_another_policy(field: str) -> None:
    preset = presets.load("azure-2020")
    other = msgspec.structs.replace(preset, **{field: CHANGES[field]})
    assert other.digest != preset.digest
    assert len(bytes.fromhex(other.digest)) == 32


@pytest.mark.parametrize(
    "change", [{"created_before": None}, {"exemption": ExemptionPath.NEVER}, {"ids": ("payg",)}]
)
def test_the_digest_is_another_one_for_another_rule_of_one_offer(change: dict[str, Any]) -> None:
    preset = presets.load("azure-2020")
    first, second, *rest = preset.offers
    other = msgspec.structs.replace(preset, offers=(first, msgspec.structs.replace(second, **change), *rest))
    assert other.digest != preset.digest


def test_the_digest_is_that_of_the_content() -> None:
    assert presets.load("azure-2020").digest == presets.load("azure-2020").digest
    assert len({presets.load(name).digest for name in BUNDLED}) == len(BUNDLED)
