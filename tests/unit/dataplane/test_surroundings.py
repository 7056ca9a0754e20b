"""Changed surroundings are logged once, and a kernel that does not answer never makes the ruleset more open."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest

from portward.config.keys import Config
from portward.dataplane import rtnetlink, surroundings
from portward.dataplane.desired import NOTHING, Surroundings
from portward.dataplane.links import Device
from portward.dataplane.surroundings import SurroundingsMonitor
from portward.dataplane.tunnels import Ports

CONFIG = Config(segments=("vni*",), uplinks=("up0",))
BRIDGED = (Device(1, "vni1", master=2), Device(2, "br0", "bridge"))
VXLAN = Device(3, "vx", "vxlan", ports=frozenset((4790,)))


def answers(monkeypatch: pytest.MonkeyPatch, found: Ports | None) -> None:
    """The answer of generic netlink; None: an error."""

    def find(_: Iterable[Device]) -> Ports:
        if found is None:
            raise OSError(1, "refused")
        return found

    monkeypatch.setattr("portward.dataplane.surroundings.genetlink.tunnel_ports", find)


def test_a_device_above_a_segment_is_logged_once_until_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers(monkeypatch, Ports())
    monitor = SurroundingsMonitor()
    with caplog.at_level(logging.INFO):
        for devices in (BRIDGED, BRIDGED, (), BRIDGED):
            found = monitor.look(devices, CONFIG, NOTHING)
            assert found.stacked == ({2} if devices else set())
            assert len(monitor.warnings) == bool(devices)
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.ERROR, logging.INFO, logging.ERROR], "that it is gone is logged too"
    assert caplog.messages[1] == f"no longer: {caplog.messages[0]}"


def test_ports_stay_while_the_kernel_does_not_say_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = SurroundingsMonitor()
    answers(monkeypatch, Ports(frozenset((5555,)), frozenset((51820,))))
    before = monitor.look((), CONFIG, NOTHING)
    answers(monkeypatch, None)
    found = monitor.look((VXLAN,), CONFIG, before)
    assert found == Surroundings(frozenset((5555, 4790)), frozenset((51820,)), known=frozenset((3,)))
    answers(monkeypatch, Ports())
    assert monitor.look((), CONFIG, found) == NOTHING


def test_what_others_have_found_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, Ports())
    assert SurroundingsMonitor().look((), CONFIG, NOTHING._replace(guard=True)).guard


def test_without_rtnetlink_the_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[Device, ...]:
        raise OSError(97, "no such protocol")

    monkeypatch.setattr(rtnetlink, "devices", refuse)
    assert surroundings.found(CONFIG, bridged=True) == NOTHING
