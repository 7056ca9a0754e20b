"""A reserve of file descriptors is available when it is needed, and each descriptor is closed once."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from portward.base.descriptors import Reserve, available, raise_limit
from unit.scarce import count, no_descriptors


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_is_lent_can_be_had_and_comes_back() -> None:
    before = count()
    reserve = Reserve(4)
    with no_descriptors():
        assert not available(1)
        with reserve.lent():
            assert available(4)
            assert not available(5)
        assert not available(1)
        assert reserve.missing == 0
    reserve.release()
    assert count() == before


def test_blocks_may_stand_in_each_other() -> None:
    reserve = Reserve(2)
    with no_descriptors(), reserve.lent():
        with reserve.lent():
            assert available(2)
        assert available(2)
    assert reserve.missing == 0
    reserve.release()


def test_a_descriptor_that_other_code_has_taken_is_taken_back_later() -> None:
    reserve = Reserve(2)
    with no_descriptors():
        with reserve.lent():
            stranger = os.eventfd(0)
        assert reserve.missing == 1
        os.close(stranger)
        reserve.refill()
        assert reserve.missing == 0
    reserve.release()


def test_no_descriptor_is_closed_twice() -> None:
    reserve = Reserve(2)
    reserve.release()
    strangers = [os.eventfd(0) for _ in range(2)]
    reserve.release()
    for stranger in strangers:
        os.close(stranger)  # raises if the reserve has closed it


def test_asking_whether_descriptors_are_there_takes_none() -> None:
    before = count()
    assert available(8)
    assert count() == before


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count() + 64, hard))
    assert raise_limit() == hard
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_code_of_others_is_not_called_without_descriptors() -> None:
    reserve = Reserve(2)
    with no_descriptors():
        with reserve.ensured(2):
            assert available(2)
        with pytest.raises(OSError, match="Too many open files"), reserve.ensured(3):
            raise AssertionError("it must not get here")
        assert reserve.missing == 0
    reserve.release()


def test_what_the_owner_uses_is_not_held_as_well() -> None:
    reserve = Reserve(3)
    reserve.give_one()
    used = os.eventfd(0)
    reserve.refill(1)
    assert reserve.missing == 1
    os.close(used)
    reserve.refill()
    assert reserve.missing == 0


def test_a_reserve_without_an_owner_holds_nothing() -> None:
    before = count()
    Reserve(4)
    assert count() == before
