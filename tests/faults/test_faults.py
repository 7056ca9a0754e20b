"""Every kind of fault once: none may have `Outcome.violations`. `python -m tests.faults` repeats them.

The last tests show that the harness notices leaks, lost connections, wrong verdicts and lost records.
"""

from __future__ import annotations

import signal
from ipaddress import ip_network
from uuid import uuid4

import msgspec
import pytest

from faults import traffic
from faults.faults import FAULTS
from faults.ground import Ground, Outcome
from faults.inject.points import POINTS, Point, find
from kernel.conftest import ALLOWED, DENIED
from portward.lab.topology import CONTOSO, FABRIKAM
from portward.model import Attachment, Subscription

STOPPED = "stop-worker"


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - {STOPPED}))
def test_nothing_leaks_is_wrong_afterwards_or_is_lost(ground: Ground, name: str) -> None:
    broken: list[Outcome] = [outcome for outcome in FAULTS[name](ground, 1) if outcome.violations]
    assert not broken, "\n".join(f"{outcome.name}: {outcome.violations}" for outcome in broken)


def test_a_worker_that_is_stopped_lets_nothing_out(ground: Ground) -> None:
    outcomes = list(FAULTS[STOPPED](ground, 1))
    assert not [outcome.violations for outcome in outcomes if outcome.violations]
    assert not [outcome.note for outcome in outcomes if "nobody noticed" in outcome.note]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_every_point_is_there(point: Point) -> None:
    assert callable(getattr(*find(point)[:2]))


# --- the harness notices each kind of violation ---


def test_what_leaks_is_seen(ground: Ground) -> None:
    ground.agents.stop()
    with ground.traffic.measured() as figures:
        ground.nft("delete table inet portward")
        ground.sent_for(0.2)
        ground.agents.start()
        ground.recovered()
    assert len(figures.leaked) > 10
    assert not figures.missed


def test_connections_that_are_not_opened_are_seen(ground: Ground) -> None:
    with ground.traffic.measured() as figures:
        # The daemon is stopped. Otherwise it would remove the rule within milliseconds, before a connection is
        # tried.
        pid = ground.agents.pid
        ground.kill(pid, signal.SIGSTOP)
        ground.nft('insert rule inet portward screen iifname "vni1001" tcp dport 25 drop')
        ground.sent_for(0.5)
        ground.kill(pid, signal.SIGCONT)
        ground.recovered()
    assert figures.without > 0
    assert figures.without_known > 0


def test_a_packet_with_another_verdict_than_applied_is_seen(ground: Ground) -> None:
    id_, address = next(iter(ground.subjects.items()))
    known = ground.model.records[f"subscriptions/{id_}"]
    assert isinstance(known, Subscription)
    other = msgspec.structs.replace(known, offer=ALLOWED if known.offer == DENIED else DENIED)
    ground.model.records[f"subscriptions/{id_}"] = other
    wrong, lost = ground.wrong(), ground.lost()
    ground.model.records[f"subscriptions/{id_}"] = known
    assert [one for one in wrong if one.startswith("explain says") and address in one]
    assert [one for one in wrong if one.startswith("a packet of") and address in one]
    assert lost == [f"subscriptions/{id_}"]
    assert not ground.wrong()


def test_a_record_that_is_not_there_is_seen(ground: Ground) -> None:
    never = Attachment(segment=CONTOSO.segment, address=ip_network("10.9.9.9"), subscription=uuid4())
    ground.model.records["attachments/vni1001/10.9.9.9"] = never
    lost = ground.lost()
    del ground.model.records["attachments/vni1001/10.9.9.9"]
    assert lost == ["attachments/vni1001/10.9.9.9"]
    assert not ground.lost()


def test_a_wrong_cached_verdict_is_seen(ground: Ground) -> None:
    element = f"{{ {ground.index(FABRIKAM)} . {traffic.BLOCKED4[9_999]} }}"
    ground.nft(f"add element inet portward allow4 {element}")
    wrong = ground.wrong()
    ground.nft(f"add element inet portward allow4 {element}\ndelete element inet portward allow4 {element}")
    assert any("allow remembers" in one and str(traffic.BLOCKED4[9_999]) in one for one in wrong)
    assert not ground.wrong()
