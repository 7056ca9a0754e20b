"""The rules of other programs that change addresses or ports need the guard. Their other rules do not matter."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from portward.dataplane.names import CLOSED, TABLE
from portward.dataplane.namespacelock import LOCK_TABLE
from portward.dataplane.nfnetlink import Chain, Expression
from portward.dataplane.others import OthersMonitor, look, seen
from portward.errors import KernelError

_PREROUTING, _POSTROUTING = 0, 4
_INET, _IP, _BRIDGE = 1, 2, 7


class Kernel:
    """A fake of the kernel's tables."""

    def __init__(self, chains: Iterable[Chain] = (), expressions: Iterable[Expression] = ()) -> None:
        self._chains, self._expressions = tuple(chains), tuple(expressions)
        self.read_rules = False

    def chains(self) -> Iterable[Chain]:
        return self._chains

    def expressions(self, holding: tuple[bytes, ...]) -> Iterable[Expression]:
        self.read_rules = True
        return self._expressions


def found(
    chains: Iterable[Chain] = (), expressions: Iterable[Expression] = (), legacy: Iterable[Path] = ()
) -> Any:
    kernel: Any = Kernel(chains, expressions)
    return look(kernel, legacy)


def payload(base: int, offset: int, length: int, **more: bytes) -> Expression:
    """An expression that writes into a packet."""
    numbers = {2: base, 3: offset, 4: length, 5: 9}
    return Expression(_INET, "other", "c", "payload", {kind: struct.pack(">I", n) for kind, n in numbers.items()})


def target(name: str) -> Expression:
    """A rule of iptables-nft."""
    return Expression(_IP, "mangle", "PREROUTING", "target", {1: name.encode() + b"\0"})


def test_without_other_programs_no_guard_is_needed() -> None:
    own = [Chain(_INET, table, "screen", "filter", _PREROUTING, -302) for table in (TABLE, CLOSED, LOCK_TABLE)]
    assert not found(own).guard


@pytest.mark.parametrize("family", [_INET, _IP, 10])
@pytest.mark.parametrize("hook", [_PREROUTING, _POSTROUTING])
def test_a_chain_for_address_translation_is_named(family: int, hook: int) -> None:
    """A chain that translates sources counts, too, because it translates the replies to the packets that it let
    in."""
    others = found([Chain(family, "nat", "c", "nat", hook, 100), Chain(family, "nat", "d", "nat", hook, 101)])
    assert others.guard
    (line,) = others.why
    assert "nat, chain c, translates addresses" in line


def test_the_rules_are_not_read_if_a_chain_says_enough() -> None:
    kernel: Any = Kernel([Chain(_IP, "nat", "c", "nat", _PREROUTING, -100)])
    assert look(kernel, ()).guard
    assert not kernel.read_rules


@pytest.mark.parametrize("family", [_INET, _IP, 10])
def test_a_chain_at_our_own_priority_is_named(family: int) -> None:
    others = found([Chain(family, "other", "c", "filter", _PREROUTING, -302)])
    assert others.guard
    assert "other, chain c, stands at portward's own priority (-302 in prerouting)" in others.beside[0]


@pytest.mark.parametrize(
    "chain",
    [
        Chain(_INET, "other", "c", "filter", _PREROUTING, -301),
        Chain(_INET, "other", "c", "filter", _PREROUTING, -303),
        Chain(_INET, "other", "c", "filter", _POSTROUTING, -302),
        Chain(_BRIDGE, "other", "c", "filter", _PREROUTING, -302),
        Chain(_INET, "portward_closed", "forward", "filter", 2, -5),
    ],
)
def test_chains_that_are_not_beside_ours_are_left_alone(chain: Chain) -> None:
    assert not found([chain]).guard


@pytest.mark.parametrize(
    "expression",
    [
        payload(1, 16, 4),  # IPv4 destination
        payload(1, 12, 8),  # source and destination
        payload(1, 24, 16),  # IPv6 destination
        payload(2, 2, 2),  # destination port
        payload(2, 0, 4),  # both ports
        payload(0, 30, 4),  # beyond the link header
        target("DNAT"), target("REDIRECT"), target("NETMAP"), target("TPROXY"),
        Expression(_INET, "other", "c", "nat", {}),
    ],
)  # fmt: skip
def test_what_writes_addresses_or_ports_needs_the_guard(expression: Expression) -> None:
    assert found(expressions=[expression]).guard


@pytest.mark.parametrize(
    "expression",
    [
        payload(1, 8, 2),  # IPv4 time to live
        payload(1, 0, 2),  # type of service
        payload(1, 6, 2),  # IPv6 hop limit
        payload(2, 12, 2),  # TCP flags
        payload(0, 0, 6),  # link address
        payload(1, 16, 4)._replace(attributes={1: b"\0\0\0\1", 2: b"\0\0\0\1", 3: b"\0\0\0\x10", 4: b"\0\0\0\4"}),
        payload(1, 16, 4)._replace(table="portward"),
        target("MARK"), target("NFQUEUE"),
        Expression(_INET, "other", "c", "cmp", {}),
    ],
)  # fmt: skip
def test_what_writes_neither_needs_none(expression: Expression) -> None:
    assert not found(expressions=[expression]).guard


def test_legacy_iptables_counts_by_its_table_nat(tmp_path: Path) -> None:
    names = tmp_path / "ip_tables_names"
    assert not found(legacy=[names]).guard, "its modules are not loaded"
    names.write_text("filter\nmangle\n")
    assert not found(legacy=[names]).guard
    names.write_text("nat\nfilter\n")
    assert "legacy iptables has a table nat" in found(legacy=[names]).why[0]


def test_legacy_iptables_that_cannot_be_asked_counts(tmp_path: Path) -> None:
    assert found(legacy=[tmp_path]).guard, "a folder cannot be read as a file"


@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), KernelError("no nfnetlink")])
def test_a_kernel_that_does_not_say_counts(error: Exception) -> None:
    class Silent:
        def chains(self) -> Iterable[Chain]:
            raise error

    kernel: Any = Silent()
    assert seen(kernel).guard


def test_what_ends_is_logged_as_what_began(caplog: pytest.LogCaptureFixture) -> None:
    """On a kernel without nft_queue, loading the ruleset without the guard drops packets for some milliseconds."""
    caplog.set_level(logging.INFO)
    kernel: Any = Kernel([Chain(_IP, "nat", "c", "nat", _PREROUTING, -100)])
    watch = OthersMonitor(kernel)
    assert watch.look()
    kernel._chains = ()
    assert not watch.look()
    assert not watch.look()
    assert [message.split(":")[0] for message in caplog.messages] == [
        "table ip nat, chain c, translates addresses",
        "no longer",
        "no other program translates packets any more",
    ]
