"""Cached verdicts are read and changed, also if the kernel does not answer as it should."""

from __future__ import annotations

import pytest

from portward.dataplane.fake import FakeKernel
from portward.dataplane.names import TABLE
from portward.dataplane.verdict_cache import Element, Source
from portward.ipc import mark
from portward.ipc.mark import Class
from unit.dataplane.grounds import Plane, source

FOUR, SIX = source("10.0.0.4"), source("2001:db8::4")


@pytest.fixture
def plane() -> Plane:
    """A gateway that enforces."""
    found = Plane(FakeKernel())
    found.start()
    return found


def test_a_cached_verdict_is_found_with_its_count_and_its_time(plane: Plane) -> None:
    plane.kernel.learn("allow4", FOUR.key, packets=7)
    plane.kernel.now += 10
    plane.kernel.learn("deny6", SIX.key)
    assert plane.cache.get(FOUR) == Element(Class.ALLOW, FOUR, 7, 50)
    assert plane.cache.get(SIX) == Element(Class.DENY, SIX, 0, 60)
    assert plane.cache.get(source("10.0.0.5")) is None
    assert set(plane.cache.elements()) == {Element(Class.ALLOW, FOUR, 7, 50), Element(Class.DENY, SIX, 0, 60)}


def test_an_expired_verdict_is_no_verdict(plane: Plane) -> None:
    plane.kernel.learn("allow4", FOUR.key)
    plane.kernel.now += 60
    assert plane.cache.get(FOUR) is None
    assert not list(plane.cache.elements())


def test_without_the_table_nothing_is_known(plane: Plane) -> None:
    plane.kernel.load("flush ruleset")
    assert (plane.cache.epoch(), plane.cache.synced(), plane.cache.definitions()) == (None, None, None)
    assert plane.cache.get(FOUR) is None
    with pytest.raises(FileNotFoundError):
        list(plane.cache.elements())


@pytest.mark.parametrize("elements", ["", "{ 1, 2 }"])
def test_a_number_that_is_not_there_once_is_not_known(plane: Plane, elements: str) -> None:
    text = "flush set inet portward synced\n"
    plane.kernel.load(text + (f"add element inet portward synced {elements}" if elements else ""))
    assert plane.cache.synced() is None


@pytest.mark.parametrize("generation", [1, 8190, 8191, 8192, 2**32 - 1])
def test_the_epoch_is_that_of_the_generation(plane: Plane, generation: int) -> None:
    plane.cache.move_epoch(generation)
    assert plane.cache.epoch() == mark.epoch_of(generation)
    assert plane.reconciler.epoch_is(generation)
    assert not plane.reconciler.epoch_is(generation + 1)


@pytest.mark.parametrize("start", [1, 7900, 8189, 8190])
def test_the_epochs_that_follow_are_known_after_each_step(plane: Plane, start: int) -> None:
    """This also holds where epoch numbers wrap, after a leap, and if another program has deleted some."""
    generation = start
    for step in (0, 1, 1, 2, 23, 24, 25, 5_000, 1):
        generation += step
        if step == 2:
            plane.kernel.load("flush set inet portward coming")
            plane.cache.move_epoch(generation + 4_000)
        plane.cache.move_epoch(generation)
        found = {
            int.from_bytes(key, "little") >> 3 for key in plane.kernel.tables["portward"].sets["coming"].elements
        }
        assert found == {(generation + ahead) % 8191 for ahead in range(1, 25)}


def test_packets_over_a_segments_rate_are_read_by_interface(plane: Plane) -> None:
    plane.kernel.learn("limited_segments", (3).to_bytes(4, "little"), packets=9)
    assert plane.cache.over_miss_limit() == {3: 9}


@pytest.mark.parametrize("one", [FOUR, SIX])
def test_a_key_is_read_back_as_its_source(one: Source) -> None:
    assert Source.of(one.key) == one


def test_sources_that_are_refused_or_unknown_are_forgotten_with_the_others(plane: Plane) -> None:
    for name in ("deny4", "observed4", "refused4", "unknown4"):
        plane.kernel.learn(name, FOUR.key)
    plane.cache.forget([FOUR, SIX], 5)
    assert not plane.cached()
    assert plane.cache.synced() == 5
    assert not plane.kernel.tables[TABLE].sets["allow4"].elements
