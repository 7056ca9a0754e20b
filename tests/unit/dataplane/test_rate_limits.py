"""Rate limits in the kernel: the transactions that put a source under its limit, and remove it again."""

from __future__ import annotations

import errno

import pytest

from portward.dataplane import rate_limits as module
from portward.dataplane.elements import AddLimit, Draw
from portward.dataplane.fake import FakeKernel
from portward.dataplane.names import TABLE
from portward.dataplane.rate_limits import Bucket, RateLimits
from portward.errors import KernelError
from unit.dataplane.grounds import Plane, source, words

ONE, TWO, SIX = source("10.0.0.1"), source("10.0.0.2"), source("2001:db8::1")
TEN, FIVE = Bucket(1, 10, 2), Bucket(2, 5, 1)


@pytest.fixture
def plane() -> Plane:
    """A gateway that enforces, without any limit."""
    found = Plane(FakeKernel())
    found.start()
    found.kernel.journal.clear()
    return found


def drawing(plane: Plane) -> dict[str, str]:
    """The content of the kernel: source → limit."""
    return {str(one): str(bucket) for one, bucket in RateLimits.sources_in_kernel(plane.elements).items()}


def test_a_source_and_its_limit_come_in_one_transaction(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN, SIX: TEN, TWO: FIVE})
    assert words(plane.kernel.journal) == [
        "limit s1-10-2 10/minute burst 2, limit s2-5-1 5/minute burst 1, "
        "draw rates4 3 . 10.0.0.1: s1-10-2 3 . 10.0.0.2: s2-5-1, draw rates6 3 . 2001:db8::1: s1-10-2"
    ]
    assert plane.rate_limits.bucket(SIX) == TEN


def test_what_is_there_is_not_written_again(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN})
    plane.rate_limits.add({ONE: TEN})
    plane.rate_limits.add({})
    assert len(plane.kernel.journal) == 1


def test_another_source_of_a_limit_draws_on_the_bucket_that_is_there(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN})
    plane.rate_limits.add({TWO: TEN})
    assert words(plane.kernel.journal)[1] == "draw rates4 3 . 10.0.0.2: s1-10-2"


def test_a_source_that_gets_another_limit_is_taken_from_the_first_in_the_same_transaction(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN})
    plane.rate_limits.add({ONE: FIVE})
    assert words(plane.kernel.journal)[1] == (
        "limit s2-5-1 5/minute burst 1, delete rates4 3 . 10.0.0.1, draw rates4 3 . 10.0.0.1: s2-5-1"
    )
    assert drawing(plane) == {"3 . 10.0.0.1": "s2-5-1"}


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOENT, errno.EEXIST, errno.ENFILE])
def test_a_refused_transaction_changes_nothing_here_or_there(plane: Plane, number: int) -> None:
    plane.rate_limits.add({ONE: TEN})
    plane.kernel.refuse(number)
    with pytest.raises(KernelError):
        plane.rate_limits.add({ONE: FIVE, TWO: FIVE})
    assert plane.rate_limits.bucket(ONE) == TEN
    assert plane.rate_limits.bucket(TWO) is None
    assert drawing(plane) == {"3 . 10.0.0.1": "s1-10-2"}
    plane.rate_limits.add({ONE: FIVE, TWO: FIVE})
    assert drawing(plane) == {"3 . 10.0.0.1": "s2-5-1", "3 . 10.0.0.2": "s2-5-1"}


def test_a_full_map_refuses_until_there_is_room(plane: Plane) -> None:
    plane.kernel.tables[TABLE].sets["rates4"].size = 1
    plane.rate_limits.add({ONE: TEN})
    with pytest.raises(KernelError, match="Too many open files"):
        plane.rate_limits.add({TWO: TEN})
    assert list(plane.rate_limits.sources()) == [ONE]


def test_a_source_too_many_of_one_subscription_sends_its_oldest_away(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_SOURCES_PER_LIMIT", 3)
    crowd = [source(f"10.0.0.{n}") for n in range(1, 8)]
    for one in crowd[:4]:
        plane.rate_limits.add({one: TEN})
    assert list(plane.rate_limits.sources()) == crowd[1:4]
    plane.rate_limits.add(dict.fromkeys(crowd, TEN))
    assert list(plane.rate_limits.sources()) == crowd[4:], "of many at once the last ones stay"
    assert len(drawing(plane)) == 3


def test_the_whole_map_full_sends_the_oldest_of_the_largest_away(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_SOURCES", 3)
    large = [source(f"10.0.0.{n}") for n in range(1, 4)]
    plane.rate_limits.add(dict.fromkeys(large, TEN))
    plane.rate_limits.add({SIX: FIVE})
    assert set(plane.rate_limits.sources()) == {*large[1:], SIX}
    assert len(drawing(plane)) == 3


def test_a_source_that_a_worker_met_and_the_kernel_does_not_know_is_written_again(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN, TWO: TEN})
    del plane.kernel.tables[TABLE].sets["rates4"].elements[ONE.key]
    plane.rate_limits.recheck([ONE, TWO, SIX])
    assert list(plane.rate_limits.sources()) == [TWO]
    plane.rate_limits.add({ONE: TEN, TWO: TEN})
    assert words(plane.kernel.journal)[1:] == ["draw rates4 3 . 10.0.0.1: s1-10-2"]


def test_limits_not_in_force_and_without_sources_are_collected(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN, TWO: FIVE})
    plane.rate_limits.all_deleted()
    plane.elements.commit([])
    plane.kernel.load("flush map inet portward rates4")
    plane.rate_limits.delete_unused(lambda bucket: bucket == TEN)
    assert plane.elements.limits() == ["s1-10-2"], "one that is in force keeps what was drawn from it"
    plane.rate_limits.delete_unused(lambda bucket: False)
    assert plane.elements.limits() == []


def test_a_limit_with_sources_is_not_collected(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN})
    plane.rate_limits.delete_unused(lambda bucket: False)
    assert plane.elements.limits() == ["s1-10-2"]


def test_a_refused_collection_is_made_later(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN})
    plane.rate_limits.all_deleted()  # though another program has put the source back
    with pytest.raises(KernelError, match="busy"):
        plane.rate_limits.delete_unused(lambda bucket: False)
    plane.kernel.load("flush map inet portward rates4")
    plane.rate_limits.delete_unused(lambda bucket: False)
    assert plane.elements.limits() == []


def test_a_restart_holds_what_the_kernel_has(plane: Plane) -> None:
    plane.rate_limits.add({ONE: TEN, SIX: FIVE})
    plane.elements.commit([AddLimit("theirs", 1, 1), Draw("rates4", {TWO.key: "theirs"})])
    again = RateLimits(plane.elements)
    again.reload()
    assert {one: again.bucket(one) for one in again.sources()} == {ONE: TEN, SIX: FIVE}
    assert again.equals({ONE: TEN, SIX: FIVE})
    assert not again.equals({ONE: TEN})


def test_without_the_table_there_is_nothing_to_read(plane: Plane) -> None:
    plane.kernel.load("flush ruleset")
    with pytest.raises(FileNotFoundError):
        plane.rate_limits.reload()


@pytest.mark.parametrize("name", ["theirs", "s1-2", "s1-2-3-4", "sx-1-2", ""])
def test_a_limit_of_another_program_is_no_bucket(name: str) -> None:
    assert Bucket.named(name) is None


def test_sources_that_a_reading_misses_are_held_all_the_same(plane: Plane) -> None:
    crowd = [source(f"10.0.0.{n}") for n in range(50)]
    plane.rate_limits.add(dict.fromkeys(crowd, TEN))
    plane.kernel.overlook("rates4", [one.key for one in crowd[25:]])
    again = RateLimits(plane.elements)
    again.reload()
    assert set(again.sources()) == set(crowd)
    assert again.bucket(crowd[49]) == TEN


def test_limits_that_differ_at_each_reading_are_an_error_and_nothing_is_taken_from_them(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane.rate_limits.add({ONE: TEN})
    readings = ({source(f"10.0.1.{number}"): FIVE} for number in range(100))
    monkeypatch.setattr(RateLimits, "sources_in_kernel", lambda *_: next(readings))
    with pytest.raises(BlockingIOError, match="faster than they can be read"):
        plane.rate_limits.reload()
    assert list(plane.rate_limits.sources()) == [ONE]


def test_a_deletion_is_noted_for_the_sources_that_draw_on_a_limit(plane: Plane) -> None:
    """Other sources in the same transaction had no limit."""
    plane.rate_limits.add({ONE: TEN, SIX: TEN})
    plane.rate_limits.deleted([ONE, TWO])
    assert list(plane.rate_limits.sources()) == [SIX]
