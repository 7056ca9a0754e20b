"""`decide` gives the expected reason for every row of azure-2020-cases.yaml."""

from __future__ import annotations

from datetime import UTC, date, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
import yaml

from portward.model import Attachment, Exemption, Reason, Standing, Subscription, Workload
from portward.policy import presets
from portward.policy.decide import decide

NOW = datetime(2026, 6, 1, tzinfo=UTC)
OWNER = UUID("11111111-0000-4000-8000-000000000002")
CASES = yaml.safe_load(Path(__file__).with_name("azure-2020-cases.yaml").read_text())


def test_the_table_is_there() -> None:
    assert len(CASES) == 18


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_case(case: dict[str, Any]) -> None:
    known = {
        "case", "offer", "created", "standing", "workload", "destination", "exemption", "verdict", "reason",
    }  # fmt: skip
    assert set(case) <= known, "the table says something that this test does not read"
    decision = decide(
        presets.load("azure-2020"),
        subscription=Subscription(
            id=OWNER,
            offer=case["offer"],
            created=case.get("created", date(2020, 1, 1)),
            standing=Standing(case.get("standing", "good")),
            payment_history=True,
        ),
        exemption=_exemption(case.get("exemption")),
        attachment=Attachment(
            segment="vni1001",
            address=ip_network("10.0.0.4"),
            subscription=OWNER,
            workload=Workload(case.get("workload", "vm")),
            started=datetime(2026, 5, 1, tzinfo=UTC),
        ),
        now=NOW,
        destination=ip_address(case.get("destination", "203.0.113.25")),
    )
    assert decision.reason == Reason(case["reason"])
    assert decision.allows is (case["verdict"] == "allow")


def _exemption(expected: dict[str, Any] | None) -> Exemption | None:
    return None if expected is None else msgspec.convert({"subscription": str(OWNER)} | expected, Exemption)
