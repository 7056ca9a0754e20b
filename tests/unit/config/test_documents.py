"""How documents write networks and field names, and how a message suggests the nearest word."""

from __future__ import annotations

import pytest

from portward.config.documents import dec_hook, enc_hook, field_name, nearest, network
from portward.model import Network


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("10.0.0.4", "10.0.0.4"), ("10.0.0.4/32", "10.0.0.4"), ("10.0.0.0/24", "10.0.0.0/24"),
        ("2001:DB8:0::1", "2001:db8::1"), ("2001:db8::1/128", "2001:db8::1"), ("2001:db8::/64", "2001:db8::/64"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)  # fmt: skip
def test_a_network_is_written_as_an_operator_would(text: str, written: str) -> None:
    found = dec_hook(Network, text)
    assert enc_hook(found) == written
    assert dec_hook(Network, written) == found


@pytest.mark.parametrize("text", ["", "10.0.0", "10.0.0.0/33", "fe80::/129", "example", "10.0.0.0/8/8"])
def test_what_is_no_network_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="no IPv4 or IPv6 address or prefix"):
        network(text)


def test_hooks_refuse_types_that_are_not_theirs() -> None:
    with pytest.raises(NotImplementedError):
        dec_hook(complex, "1")
    with pytest.raises(NotImplementedError):
        enc_hook(1j)


def test_field_names_are_written_as_paths() -> None:
    assert field_name(("offers", 3, "ids", 0)) == "offers[3].ids[0]"
    assert field_name(("name",)) == "name"
    assert field_name(()) is None


def test_nearest_word_or_all_of_them() -> None:
    assert nearest("prot", ["port", "size"]) == "did you mean 'port'?"
    assert nearest("zzz", ["port", "size"]) == "known here: port, size"
