"""The mark has the same layout in Python and in the ruleset, and uses no bits of other programs."""

from __future__ import annotations

import re
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portward.base.resources import rules
from portward.ipc import mark
from portward.ipc.probe import SOURCE

DEFINES = dict(re.findall(r"(?m)^define (\w+) = (\S+)$", rules("nftables", "portward.nft").read_text()))


@pytest.mark.parametrize("name", ["OWN", "KEEP", "CLASS", "EPOCH", "MISS", "MISS_OPEN", "PASSED", "AGAIN"])
def test_the_ruleset_has_the_same_bits(name: str) -> None:
    assert int(DEFINES[name], 16) == getattr(mark, name)


@pytest.mark.parametrize("name", ["ALLOW", "DENY", "REFUSED", "UNKNOWN", "OBSERVED"])
def test_the_ruleset_has_the_same_classes(name: str) -> None:
    assert int(DEFINES[name]) == mark.Class[name]


def test_the_parts_cover_our_bits_and_no_others() -> None:
    assert mark.CLASS & mark.EPOCH == 0
    assert mark.CLASS | mark.EPOCH == mark.OWN
    assert mark.OWN ^ mark.KEEP == 0xFFFFFFFF


@given(st.integers(0, 2**32 - 1), st.sampled_from(mark.Class), st.integers(0, mark.EPOCHS - 1))
def test_a_stamp_keeps_everybody_elses_bits(before: int, verdict: mark.Class, epoch: int) -> None:
    stamped = mark.stamp(before, verdict, epoch)
    assert stamped & mark.KEEP == before & mark.KEEP
    assert stamped & mark.CLASS == verdict
    assert (stamped & mark.EPOCH) >> mark.EPOCH_SHIFT == epoch
    assert stamped < 2**32


@given(st.integers(0, 2**32 - 1))
def test_no_verdict_of_any_epoch_is_a_miss(generation: int) -> None:
    for verdict in mark.Class:
        assert mark.stamp(0, verdict, mark.epoch_of(generation)) not in (mark.MISS, mark.MISS_OPEN)


@given(st.integers(0, 2**32 - 2))
def test_the_next_generation_has_another_epoch(generation: int) -> None:
    assert mark.epoch_of(generation) != mark.epoch_of(generation + 1)


def test_the_ruleset_has_the_same_query_and_answer() -> None:
    assert int(DEFINES["PROBE"], 16) == mark.PROBE
    assert int(DEFINES["ANSWER"]) == mark.Class.ANSWER
    assert IPv4Address(DEFINES["PROBE_SOURCE"]).packed == SOURCE


def test_no_verdict_and_no_miss_is_a_query() -> None:
    stamps = {mark.stamp(0, verdict, epoch) for verdict in mark.Class for epoch in range(mark.EPOCHS)}
    assert mark.PROBE not in stamps | {mark.MISS, mark.MISS_OPEN, mark.PASSED}


def test_no_verdict_is_what_the_screen_lets_pass() -> None:
    stamps = {mark.stamp(0, verdict, epoch) for verdict in mark.Class for epoch in range(mark.EPOCHS)}
    assert mark.PASSED not in stamps | {mark.MISS, mark.MISS_OPEN}
