"""Adding up what elements count: rises are added once, and a new element is told from the old one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from portward.gateway.counts import Counts, Owner
from portward.gateway.learned import Element, Source
from portward.gateway.mark import Class

SOURCE = Source(3, b"\x0a\0\0\x04")


def counts() -> Counts:
    """Counts in which every source is of one customer."""
    return Counts(lambda source: Owner("vni1001", "contoso") if source.link == 3 else None)


def element(packets: int, expires: float = 60.0, verdict: Class = Class.DENY, source: Source = SOURCE) -> Element:
    """An element of the customer."""
    return Element(verdict, source, packets, expires)


def read(found: Counts, elements: list[Element], now: float) -> None:
    """A reading of these elements."""
    found.take_all(lambda: elements, lambda: now)


def test_a_rise_is_added_once() -> None:
    found = counts()
    read(found, [element(5)], now=0)
    read(found, [element(5, 55)], now=5)
    read(found, [element(8, 50)], now=10)
    assert found.subscriptions["contoso", Class.DENY] == 8
    assert found.segments["vni1001", Class.DENY] == 8


def test_an_element_that_counts_less_is_a_new_one() -> None:
    found = counts()
    read(found, [element(5)], now=0)
    read(found, [element(2)], now=5)
    assert found.subscriptions["contoso", Class.DENY] == 7


def test_an_element_that_outlived_its_time_is_a_new_one() -> None:
    found = counts()
    read(found, [element(5, expires=3)], now=0)
    read(found, [element(9, expires=58)], now=10)
    assert found.subscriptions["contoso", Class.DENY] == 14


def test_an_element_that_went_and_came_back_is_a_new_one() -> None:
    found = counts()
    read(found, [element(5)], now=0)
    read(found, [], now=1)
    read(found, [element(6)], now=2)
    assert found.subscriptions["contoso", Class.DENY] == 11


def test_a_last_reading_is_not_added_again() -> None:
    found = counts()
    read(found, [element(5)], now=0)
    found.take_last([element(7)], now=1)
    read(found, [element(1)], now=2)
    assert found.subscriptions["contoso", Class.DENY] == 8


def test_classes_are_kept_apart_and_remembered_ones_counted() -> None:
    found = counts()
    read(found, [element(5), element(4, verdict=Class.ALLOW), element(1, source=Source(3, b"1234"))], now=0)
    assert found.subscriptions["contoso", Class.ALLOW] == 4
    assert found.remembered == {Class.DENY: 2, Class.ALLOW: 1}


def test_a_source_of_no_segment_is_not_counted() -> None:
    found = counts()
    read(found, [element(5, source=Source(9, b"1234"))], now=0)
    assert not found.subscriptions


@given(st.lists(st.integers(0, 50), max_size=30))
def test_readings_of_a_living_element_add_up_to_its_count(rises: list[int]) -> None:
    found, total = counts(), 0
    for number, rise in enumerate(rises):
        total += rise
        read(found, [element(total, expires=1000 - number)], now=number)
    assert found.subscriptions["contoso", Class.DENY] == total


def test_what_is_forgotten_during_a_reading_is_added_once() -> None:
    found = counts()

    def elements() -> list[Element]:
        dumped = [element(5)]
        found.take_last([element(6)], now=1)  # between the dump and its end, and then it is forgotten
        return dumped

    found.take_all(elements, lambda: 0)
    read(found, [element(2)], now=2)
    assert found.subscriptions["contoso", Class.DENY] == 8
