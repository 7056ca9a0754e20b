"""The agent finds, repairs, counts and reports differences from the state that it should enforce."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from typing import Any

import pytest

from kernel.conftest import ALLOWED, Gateway
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM


def divergences(gateway: Gateway, kind: str) -> float:
    """How many differences of a kind the agent has found."""
    return gateway.agent.metrics()[f'portward_divergence_total{{kind="{kind}"}}']


def status(gateway: Gateway) -> Any:
    """The output of `portward status --json`."""
    return json.loads(gateway.agent.portward("status", "--json").stdout)


def answered(gateway: Gateway) -> float:
    """How many queries of the self-check have been answered, as the kernel counts them."""
    return gateway.agent.metrics()['portward_screen_packets_total{rule="answered"}']


def test_workers_are_asked_through_the_kernel_all_the_time(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(queue={"workers": 2})
    before = answered(gateway)
    until(lambda: answered(gateway) >= before + 4, "two rounds of queries to two workers, answered")
    events = gateway.agent.metrics()
    assert events['portward_worker_events_total{event="probed"}'] >= 4
    assert events["portward_self_check_age_seconds"] < 60
    assert sum(status(gateway)["self_check"]["divergences"].values()) == 0  # once: a difference would stay
    until(lambda: "every worker answered" in gateway.agent.portward("status").stdout, "status says so")


def test_a_worker_that_stands_still_is_replaced(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    gateway.source(CONTOSO, "10.0.0.9", ALLOWED)
    until(lambda: answered(gateway) >= 1, "the first answer")
    stopped = status(gateway)["workers"][0]["pid"]
    os.kill(stopped, signal.SIGSTOP)
    assert not gateway.passes(CONTOSO, "10.0.0.9"), "its packets get no verdict"
    until(lambda: divergences(gateway, "worker") == 1, "the silent worker found")
    until(lambda: status(gateway)["workers"][0]["pid"] not in (stopped, None), "another worker")
    until(lambda: gateway.passes(CONTOSO, "10.0.0.9"), "the allowed source")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")


def test_a_worker_that_is_only_starting_is_not_taken_for_silent(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    until(lambda: answered(gateway) >= 1, "the first answer")
    for _ in range(4):
        before = status(gateway)["workers"][0]["pid"]
        # Wait until just before the next query. It then finds no queue.
        time.sleep(2 - (time.monotonic() + 0.07) % 2)  # pause: queries go out at even seconds
        os.kill(before, signal.SIGKILL)
        until(lambda before=before: status(gateway)["workers"][0]["pid"] != before, "another worker")  # type: ignore[misc]
        time.sleep(2.2)  # pause: as long as the self-check is patient
    until(lambda: status(gateway)["workers"][0]["restarts"] == 4, "each restart is in the status")
    assert divergences(gateway, "worker") == 0


def test_a_query_that_went_with_the_rules_of_others_ends_no_worker(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    until(lambda: answered(gateway) >= 1, "the first answer")
    before = status(gateway)["workers"][0]["pid"]
    for milliseconds in range(0, 16, 2):
        # Wait until just before the next query. It then finds no rules.
        time.sleep(2 - (time.monotonic() + milliseconds / 1000) % 2)  # pause: as above
        namespaces.load(gateway.lab.gateway, "flush ruleset")
        time.sleep(2.2)  # pause: as long as the self-check is patient
    until(lambda: divergences(gateway, "ruleset") == 8, "each flush is counted")
    assert divergences(gateway, "worker") == 0
    assert status(gateway)["workers"][0]["pid"] == before  # once: another worker would stay


def fed(gateway: Gateway, seconds: float) -> int:
    """How often the agent feeds the service manager's watchdog within `seconds`."""
    socket, times = gateway.agent.notified, 0
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([socket], [], [], left)[0]:
            times += socket.recv(4096) == b"WATCHDOG=1"
    return times


def test_the_watchdog_is_fed_only_while_workers_answer(make_gateway, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    gateway = make_gateway()
    until(lambda: answered(gateway) >= 1, "the first answer")
    until(lambda: fed(gateway, 3) >= 2, "the watchdog is fed")
    rule = 'type filter hook prerouting priority -400; iifname "lo" ip saddr 127.80.87.25 drop;'
    namespaces.load(gateway.lab.gateway, f"table inet others {{ chain before {{ {rule} }}; }}")
    until(lambda: divergences(gateway, "worker") >= 1, "no worker can be reached")
    fed(gateway, 0.2)  # skip the notifications that were sent before
    assert fed(gateway, 3) == 0
    namespaces.load(gateway.lab.gateway, "delete table inet others")
    until(lambda: fed(gateway, 1) > 0, "answers again")


def test_a_verdict_that_another_program_adds_to_a_set_is_taken_out(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    assert gateway.passes(CONTOSO, "10.0.0.4"), "a right one, which stays"
    added = namespaces.run(
        gateway.lab.gateway,
        ["nft", "add element inet portward allow4 { vni1002 . 10.0.0.4 timeout 10m }"],
    )
    assert added.returncode == 0, added.stderr
    until(lambda: divergences(gateway, "remembered") == 1, "the wrong verdict found")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    last = status(gateway)["self_check"]["last_difference"]
    assert re.fullmatch(r"[-0-9]{10}T[:0-9]{8}Z \w+: .*10\.0\.0\.4 behind interface.*", last)
    listing = gateway.listing("allow4")
    assert "10.0.0.4" in listing, "the right one"


def test_a_ruleset_that_was_removed_is_counted(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    namespaces.run(gateway.lab.gateway, ["nft", "delete", "table", "inet", "portward"])
    until(lambda: divergences(gateway, "ruleset") == 1, "the missing ruleset found")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
