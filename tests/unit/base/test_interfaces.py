"""Each interface name has one text and takes one line on a screen, and each pattern has one meaning."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portward.base.interfaces import decoded, encoded, is_name, is_pattern, is_segment_name, matches, shown

_KERNELS = st.binary(min_size=1, max_size=15).filter(lambda name: is_name(decoded(name)))


@given(_KERNELS)
def test_a_name_comes_back_as_the_bytes_it_was(name: bytes) -> None:
    assert encoded(decoded(name)) == name


@given(_KERNELS, _KERNELS)
def test_a_pattern_matches_by_bytes(name: bytes, stem: bytes) -> None:
    """A pattern may end within a character of several bytes. Comparing texts would give different results."""
    text = decoded(stem[:14])
    assert matches((f"{text}*",), decoded(name)) is name.startswith(encoded(text))
    assert matches((text,), decoded(name)) is (name == encoded(text)) or text.endswith("*")


@given(_KERNELS, _KERNELS)
def test_no_two_names_look_the_same_and_none_commands_a_terminal(one: bytes, other: bytes) -> None:
    assert shown(decoded(one)).isprintable()
    assert (shown(decoded(one)) == shown(decoded(other))) is (one == other)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"vni1001", "vni1001"),
        (b"a\xff", r"a\xff"),
        (rb"a\xff", r"a\\xff"),
        (b"\x1b[m", r"\x1b[m"),
        ("ö".encode(), "ö"),
    ],
)
def test_names_as_they_are_shown(name: bytes, expected: str) -> None:
    assert shown(decoded(name)) == expected


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "a%d", "à", "a" * 16, "ö" * 8, "\ud800"]
)
def test_what_the_kernel_refuses_is_no_name(name: str) -> None:
    assert not is_name(name)
    assert not is_pattern(name)
    assert not is_segment_name(name)


@pytest.mark.parametrize("name", ["a", "-", "...", "ö" * 7, "a" * 15, "7", "$x", "{", "@a", "#", "a;b", "a,b"])
def test_what_the_kernel_takes_and_nft_can_quote_is_a_pattern(name: str) -> None:
    assert is_name(name)
    assert is_pattern(name)
    assert is_segment_name(name)


@pytest.mark.parametrize(
    "pattern", ["*", "a**", "a*b", "ten\\*", "ten\\", 'q"', 'q"*', "ö" * 7 + "x*", "a\x01*", "a *"]
)
def test_what_nft_would_take_for_something_else_is_refused(pattern: str) -> None:
    assert not is_pattern(pattern)


@pytest.mark.parametrize("pattern", [".*", "..*", "a*", "ö*", "a" * 14 + "*", "$*"])
def test_a_beginning_of_a_name_and_a_star_is_a_pattern(pattern: str) -> None:
    assert is_pattern(pattern)


def test_the_bytes_are_those_of_pythons_own_functions() -> None:
    """`if_nametoindex` gets the text that `fsdecode` makes of the bytes."""
    assert os.fsdecode(encoded("vni\udcff")) == "vni\udcff"
