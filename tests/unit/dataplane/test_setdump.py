"""Elements in a dump message: unpacking them at once gives the same as walking through them, for every layout."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portward.base.netlink import attribute, nest, string
from portward.dataplane import setdump
from portward.dataplane.setdump import SetElement


def element(key: bytes, packets: int | None = None, expires: int | None = None, **more: bytes) -> bytes:
    """An element as the kernel writes it: key, counter, expiration; `more` are raw attributes before and after."""
    body = more.get("before", b"") + nest(1, attribute(1, key))
    if packets is not None:
        counter = attribute(1, struct.pack(">Q", packets * 40)) + attribute(2, struct.pack(">Q", packets))
        body += nest(7, attribute(1, string("counter")) + nest(2, counter))
    if expires is not None:
        body += attribute(5, struct.pack(">Q", expires))
    return nest(1, body + more.get("after", b""))


def walked(data: bytes) -> list[setdump.SetRow]:
    return [found[:3] for found in setdump.elements(data)]


@pytest.mark.parametrize("size", [8, 20])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("expiring", [True, False])
def test_a_message_of_like_elements_is_unpacked_at_once(size: int, counted: bool, expiring: bool) -> None:
    want = [(bytes([number % 256]) * size, number * counted, number * 7 * expiring) for number in range(700)]
    data = b"".join(element(key, p if counted else None, e if expiring else None) for key, p, e in want)
    assert setdump._uniform(data) == want
    assert setdump.rows(data) == walked(data) == want


def test_bytes_counted_may_differ_from_element_to_element() -> None:
    data = b"".join(element(bytes([number] * 8), number, 5) for number in range(200))
    assert setdump._uniform(data) is not None


@pytest.mark.parametrize(
    "odd",
    [
        element(bytes(8), 3),
        element(bytes(20), 3, 9),
        element(bytes(8), 3, 9, after=attribute(4, struct.pack(">Q", 60_000))),
        element(bytes(8), 3, 9, after=attribute(9, string("s1-2-3"))),
        element(bytes(8), 3, 9, before=attribute(3, struct.pack(">I", 1))),
        nest(1, attribute(5, struct.pack(">Q", 9)) + nest(1, attribute(1, bytes(8)))),
    ],
)
def test_an_element_of_another_layout_is_walked(odd: bytes) -> None:
    like = [element(bytes([number] * 8), number, 60_000) for number in range(1, 20)]
    for place in (0, 7, len(like)):
        data = b"".join([*like[:place], odd, *like[place:]])
        assert setdump._uniform(data) is None
        assert setdump.rows(data) == walked(data)
        assert len(setdump.rows(data)) == 20


def test_elements_of_one_length_but_with_other_attributes_are_walked() -> None:
    """An expiration and a timeout have the same length, and differ only in their type."""
    timeout = nest(1, nest(1, attribute(1, bytes(8))) + attribute(4, struct.pack(">Q", 60_000)))
    expiring = element(b"\1" * 8, None, 60_000)
    assert len(timeout) == len(expiring)
    assert setdump.rows(expiring + timeout) == [(b"\1" * 8, 0, 60_000), (bytes(8), 0, 0)]


def test_the_object_of_a_map_is_read() -> None:
    data = element(bytes(8), after=attribute(9, string("s7-60-5")))
    assert list(setdump.elements(data)) == [SetElement(bytes(8), 0, 0, "s7-60-5")]


def test_no_elements_are_no_rows() -> None:
    assert setdump.rows(b"") == []


@given(st.binary(max_size=300))
def test_what_is_no_list_of_elements_is_read_as_the_walk_reads_it(data: bytes) -> None:
    try:
        want = walked(data)
    except (struct.error, UnicodeDecodeError) as error:
        with pytest.raises(type(error)):
            setdump.rows(data)
        return
    assert setdump.rows(data) == want


@given(st.integers(1, 40), st.integers(0, 2_000), st.integers(0, 255))
def test_a_damaged_message_is_read_as_the_walk_reads_it(count: int, place: int, value: int) -> None:
    data = bytearray(b"".join(element(bytes([number] * 20), number, 1_000 + number) for number in range(count)))
    data[place % len(data)] = value
    test_what_is_no_list_of_elements_is_read_as_the_walk_reads_it.hypothesis.inner_test(bytes(data))  # type: ignore[attr-defined]


@given(st.integers(0, 200))
def test_a_message_cut_short_is_read_as_the_walk_reads_it(left: int) -> None:
    data = b"".join(element(bytes([number] * 8), number, 1_000) for number in range(3))[:left]
    test_what_is_no_list_of_elements_is_read_as_the_walk_reads_it.hypothesis.inner_test(data)  # type: ignore[attr-defined]
