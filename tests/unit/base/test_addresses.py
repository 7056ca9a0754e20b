"""Every verb reads an address in the same way, however it is written."""

from __future__ import annotations

import json
import sys
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

import pytest

from portward.base.addresses import parse_address, unmapped
from portward.cli import main
from portward.errors import InputError
from unit.store.samples import EXAMPLE

SEGMENT, SOURCE = "vni1001", "10.0.0.4"
MAPPED = ("::ffff:10.0.0.4", "::FFFF:a00:4", "0:0:0:0:0:ffff:10.0.0.4")


@pytest.mark.parametrize("text", MAPPED)
def test_an_ipv4_address_within_ipv6_is_the_ipv4_address(text: str) -> None:
    assert parse_address(text, "ADDRESS") == IPv4Address(SOURCE)
    assert unmapped(ip_network(text)) == ip_network(SOURCE)


@pytest.mark.parametrize("text", ["2001:db8::1", "::10.0.0.4", "64:ff9b::a00:4", "::ffff:0:a00:4"])
def test_others_are_what_they_are(text: str) -> None:
    assert parse_address(text, "ADDRESS") == IPv6Address(text)
    assert unmapped(ip_network(text)) == ip_network(text)


@pytest.mark.parametrize("text", ["::/0", "::/64", "::/80", "2001:db8::/32"])
def test_wide_prefixes_are_what_they_are(text: str) -> None:
    assert unmapped(ip_network(text)) == ip_network(text)


def test_a_prefix_of_them_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10.0.0.0/24 would be right"):
        unmapped(ip_network("::ffff:10.0.0.0/120"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fe80::1%eth0", "has a zone: leave it out"),
        ("[2001:db8::1]", "2001:db8::1 would be right"),
        (" 10.0.0.4", "10.0.0.4 would be right"),
        ("10.0.0.4\n", "10.0.0.4 would be right"),
        ("010.0.0.4", "no number in it may begin with a 0"),
        ("10.0.0.04", "no number in it may begin with a 0"),
        ("10.0.0.4/32", "is no IPv4 or IPv6 address"),
        ("١٠.0.0.4", "is no IPv4 or IPv6 address"),
        ("", "is no IPv4 or IPv6 address"),
        ("x" * 100_000, "is no IPv4 or IPv6 address"),
    ],
)
def test_what_is_none_is_said_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(InputError, match="ADDRESS: ") as caught:
        parse_address(text, "ADDRESS")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration whose store holds the example, with no agent."""
    path = tmp_path / "portward.toml"
    path.write_text('segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:portward.db"\ntable = "table"\n')
    (tmp_path / "inventory.yaml").write_text(EXAMPLE)
    return str(path)


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str, *arguments: str) -> Any:
    """The JSON that a verb prints."""
    monkeypatch.setattr(sys, "argv", ["portward", *arguments, "--json", "--config", config])
    with pytest.raises(SystemExit, match="0"):
        main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("address", MAPPED)
def test_every_verb_says_of_it_what_it_says_of_the_ipv4_address(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    def say(*arguments: str) -> Any:
        return said(monkeypatch, capsys, config, *arguments)

    say("apply", str(Path(config).with_name("inventory.yaml")))
    assert say("explain", SEGMENT, address) == say("explain", SEGMENT, SOURCE)
    assert say("explain", SEGMENT, SOURCE)["subscription"] is not None
    to = ("explain", SEGMENT, SOURCE, "--to")
    assert say(*to, address) == say(*to, SOURCE)
    first, second = (say("diagnose", SEGMENT, one) for one in (address, SOURCE))
    assert first["facts"] | {"at": ""} == second["facts"] | {"at": ""}
    assert first["customer"] == second["customer"]
    at = ("--at", "2026-01-10T08:00:00Z")
    assert say("attachment", "started", SEGMENT, address, *at)["attachment"]["address"] == SOURCE


def test_an_inventory_may_write_it_so(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*arguments: str) -> Any:
        return said(monkeypatch, capsys, config, *arguments)

    inventory = Path(config).with_name("inventory.yaml")
    inventory.write_text(EXAMPLE.replace(f"address: {SOURCE}", 'address: "::ffff:10.0.0.4"'))
    assert "::ffff" in inventory.read_text()
    say("apply", str(inventory))
    assert say("explain", SEGMENT, SOURCE)["matched"] == SOURCE
    inventory.write_text(EXAMPLE)
    assert say("apply", "--dry-run", str(inventory))["changed"] == 0
