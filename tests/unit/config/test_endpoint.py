"""The address of the metrics is an IP address and a port. A host name is refused, so no resolver is ever asked."""

from __future__ import annotations

import pytest

from portward.config.endpoint import parse


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("127.0.0.1:9100", ["127.0.0.1"]),
        ("[::1]:9100", ["::1"]),
        ("[2001:DB8:0::5]:9100", ["2001:db8::5"]),
        ("[::]:9100", ["::"]),
        (":9100", ["0.0.0.0", "::"]),  # noqa: S104 # nothing listens
        ("localhost:9100", ["127.0.0.1", "::1"]),
        ("LocalHost:9100", ["127.0.0.1", "::1"]),
    ],
)
def test_addresses_are_taken(text: str, addresses: list[str]) -> None:
    found = parse(text)
    assert [one.host for one in found] == addresses
    assert all(one.port == 9100 for one in found)
    assert all((one.version == 6) == (":" in one.host) for one in found)


@pytest.mark.parametrize("text", ["127.0.0.1:9100", "[::1]:9100"])
def test_an_endpoint_is_shown_as_it_is_written(text: str) -> None:
    assert [str(one) for one in parse(text)] == [text]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", "HOST:PORT"),
        ("9100", "HOST:PORT"),
        ("127.0.0.1", "HOST:PORT"),
        ("127.0.0.1:", "HOST:PORT"),
        ("127.0.0.1:0", "HOST:PORT"),
        ("127.0.0.1:65536", "HOST:PORT"),
        ("127.0.0.1:٩١٠٠", "HOST:PORT"),
        ("127.0.0.1:9100 ", "HOST:PORT"),
        ("::1:9100", "HOST:PORT"),
        ("gateway.example:9100", "no name is looked up"),
        ("gw1:9100", "no name is looked up"),
        ("127.1:9100", "no name is looked up"),
        ("127.0.0.01:9100", "no name is looked up"),
        (" 127.0.0.1:9100", "no name is looked up"),
        ("[127.0.0.1]:9100", "no name is looked up"),
        ("[]:9100", "no name is looked up"),
        ("[::1%lo]:9100", "an address of this host"),
        ("[fe80::1]:9100", "an address of this host"),
        ("[ff02::1]:9100", "an address of this host"),
        ("224.0.0.1:9100", "an address of this host"),
    ],
)
def test_anything_else_is_refused_with_what_would_be_right(text: str, right: str) -> None:
    with pytest.raises(ValueError, match=right):
        parse(text)


@pytest.mark.parametrize(
    ("text", "reachable"), [(":9100", ["127.0.0.1", "::1"]), ("10.0.0.1:9100", ["10.0.0.1"]), ("[::]:1", ["::1"])]
)
def test_this_host_reaches_what_listens_on_all_addresses(text: str, reachable: list[str]) -> None:
    assert [one.reachable for one in parse(text)] == reachable
