"""The fake kernel behaves like the real one: both get the same commands, and their answers and states are
compared."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from kernel.conftest import lab_name
from portward.base.resources import rules
from portward.dataplane import namespacelock, xtables
from portward.dataplane.elements import (
    Add,
    AddLimit,
    Change,
    Delete,
    DeleteLimit,
    DeleteRule,
    Draw,
    Flush,
    InsertRule,
    RefusedError,
)
from portward.dataplane.fake import FakeKernel
from portward.dataplane.names import CLOSED, FIXED_SETS, TABLE
from portward.dataplane.namespacelock import LOCK_TABLE, NamespaceLock
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.verdict_cache import Source
from portward.errors import KernelError
from portward.lab import namespaces
from portward.lab.agent import until
from unit.dataplane.grounds import Plane

SMALL = """
table inet portward {
  counter internal { comment "a counter" }
  set epoch { typeof meta mark; elements = { 0x8 } }
  set allow4 { type iface_index . ipv4_addr; flags dynamic,timeout; timeout 60s; size 4; counter; }
  set deny4 { type iface_index . ipv4_addr; flags dynamic,timeout; timeout 60s; size 4; counter; }
  map rates4 { type iface_index . ipv4_addr : limit; size 3; }
  chain screen {
    type filter hook prerouting priority raw - 2; policy accept;
    iif . ip saddr @deny4 drop
    goto classify
  }
  chain classify {
    counter name internal accept
  }
}
"""
KEYS = [Source(1, bytes((10, 0, 0, host))).key for host in range(1, 7)]


class Side:
    """The real kernel or the fake one: a netlink socket, an nft, and the elements."""

    def __init__(self, netlink: NfNetlink, nft: Nft) -> None:
        self.netlink, self.nft = netlink, nft
        self.elements = KernelElements(netlink)

    def outcome(self, step: Callable[[Side], object]) -> tuple[object, int]:
        """Runs a step; gives its result or the reason of the refusal, and by how much the generation rose."""
        before = self.netlink.generation()
        said: object
        try:
            said = step(self)
        except RefusedError as error:
            said = errno.errorcode[error.errno]
        except (KernelError, OSError) as error:
            # Of an error message of nft only the kernel's reason is compared.
            reasons = [os.strerror(number) for number in errno.errorcode if os.strerror(number) in str(error)]
            said = reasons[0] if reasons else "a syntax error"
        return said, (self.netlink.generation() - before) % 2**32

    def state(self) -> dict[str, Any]:
        """Everything that portward can read of its table."""
        sets = self.netlink.sets(TABLE)
        return {
            "sets": sets,
            "hooks": list(self.netlink.hooks(TABLE).items()) if sets else [],
            "chains": sorted(self.netlink.chains()),
            "rows": {name: sorted(row[0] for row in self.elements.rows(name)) for name in sets if "4" in name},
            "rates": sorted((e.key, e.object) for e in self.elements.elements("rates4"))
            if "rates4" in sets
            else [],
            "limits": sorted(self.elements.limits()),
            "counters": self.netlink.counters(TABLE) if sets else {},
            "closed": self.netlink.fingerprint(CLOSED, ()) is not None,
        }


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A network namespace without links."""
    name = lab_name()
    namespaces.make(name)
    yield name
    namespaces.remove(name)


@pytest.fixture
def sides(namespace: str) -> Iterator[tuple[Side, Side]]:
    """The kernel and the fake, both without any table."""
    with namespaces.inside(namespace):
        netlink = NfNetlink()
        nft = Nft(netlink, compiles=False)
        nft.load("flush ruleset")
        native = xtables.has_native_queue(nft)
        fake = FakeKernel(native=native)
        socket = fake.netlink()
        yield Side(netlink, nft), Side(socket, fake.nft(socket))
        nft.load("flush ruleset")
        netlink.close()


def same(sides: tuple[Side, Side], step: Callable[[Side], object]) -> tuple[object, int]:
    """Runs a step on both sides, and asserts that outcome and state are the same; gives the outcome."""
    kernel, fake = (side.outcome(step) for side in sides)
    assert fake == kernel
    assert sides[1].state() == sides[0].state()
    return kernel


def changes() -> some.SearchStrategy[list[Change]]:
    """A transaction of a few changes, many of which the kernel refuses."""
    keys = some.lists(some.sampled_from(KEYS), min_size=1, max_size=3, unique=True)
    sets = some.sampled_from(["allow4", "deny4", "missing4"])
    limits = some.sampled_from(["s1-10-5", "s2-10-5"])
    change = some.one_of(
        some.builds(Add, sets, keys),
        some.builds(Delete, sets, keys),
        some.builds(Delete, some.just("rates4"), keys),
        some.builds(Flush, some.sampled_from(["allow4", "deny4", "rates4"])),
        some.builds(AddLimit, limits, some.just(10), some.just(5)),
        some.builds(DeleteLimit, limits),
        some.builds(
            Draw, some.just("rates4"), some.dictionaries(some.sampled_from(KEYS), limits, min_size=1, max_size=3)
        ),
    )
    return some.lists(change, min_size=1, max_size=4)


@given(transactions=some.lists(changes(), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_transactions_of_elements_do_the_same(sides: tuple[Side, Side], transactions: list[list[Change]]) -> None:
    for side in sides:
        side.nft.load("flush ruleset")
        side.nft.load(SMALL)
    for transaction in transactions:
        same(sides, lambda side, transaction=transaction: side.elements.commit(transaction))  # type: ignore[misc]


def test_an_element_that_has_expired_is_not_there_any_more(sides: tuple[Side, Side]) -> None:
    for side in sides:
        side.nft.load(SMALL.replace("timeout 60s", "timeout 1s"))
    same(sides, lambda side: side.elements.commit([Add("allow4", KEYS[:2])]))
    until(lambda: not sides[0].elements.rows("allow4"), "the kernel's have expired")
    sides[1].netlink._kernel.now += 1  # type: ignore[attr-defined]
    assert same(sides, lambda side: side.elements.commit([Delete("allow4", KEYS[:1])])) == ("ENOENT", 0)
    assert same(sides, lambda side: side.elements.element("allow4", KEYS[0])) == (None, 0)
    # `Add` and then `Delete` in one transaction removes it, whether it has expired or not.
    assert (
        same(sides, lambda side: side.elements.commit([Add("allow4", KEYS), Delete("allow4", KEYS)]))[0]
        == "ENFILE"
    )
    same(sides, lambda side: side.elements.commit([Add("allow4", KEYS[:2]), Delete("allow4", KEYS[:2])]))


def test_a_rule_goes_to_the_head_of_its_chain_and_away_by_its_handle(sides: tuple[Side, Side]) -> None:
    for side in sides:
        side.nft.load(SMALL.replace("chain classify", "set gated { typeof iif; }\n  chain classify"))
    before = [side.netlink.fingerprint(TABLE, ("epoch",)) for side in sides]
    gate = InsertRule("screen", "gated", "classify")
    same(sides, lambda side: side.elements.commit([Add("gated", [KEYS[0][:4]]), gate]))
    for side in sides:
        rules = side.nft.listing("inet portward").partition("chain screen {")[2].split("}")[0]
        (first, *_) = [line.strip() for line in rules.splitlines() if line.strip() and "type filter" not in line]
        assert first == "iif @gated goto classify"
    assert same(sides, lambda side: len(side.elements.rules_on("screen", "gated"))) == (1, 0)
    assert same(sides, lambda side: side.elements.rules_on("screen", "deny4") != []) == (True, 0)
    assert same(sides, lambda side: side.elements.rules_on("classify", "gated")) == ([], 0)
    for wrong in (InsertRule("absent", "gated", "classify"), InsertRule("screen", "absent", "classify")):
        assert same(sides, lambda side, wrong=wrong: side.elements.commit([wrong])) == ("ENOENT", 0)  # type: ignore[misc]

    def away(side: Side) -> None:
        handles = side.elements.rules_on("screen", "gated")
        side.elements.commit([*(DeleteRule("screen", handle) for handle in handles), Flush("gated")])

    same(sides, away)
    assert [side.netlink.fingerprint(TABLE, ("epoch",)) for side in sides] == before
    assert same(sides, lambda side: side.elements.commit([DeleteRule("screen", 1 << 40)])) == ("ENOENT", 0)


TEXTS = [
    "create table inet portward",
    "add table inet portward",
    "delete table inet portward",
    "delete table inet portward\ndelete table inet portward",
    "flush table inet portward",
    "flush table inet portward\ndelete chain inet portward classify",
    "delete chain inet portward classify",
    "flush set inet portward epoch\nadd element inet portward epoch { 0x10 }",
    "delete set inet portward deny4",
    "flush table inet portward\ndelete set inet portward deny4\ndelete map inet portward rates4",
    "delete set inet portward absent",
    "flush chain inet portward classify",
    "add chain inet portward classify",
    "add chain inet portward learn { type filter hook prerouting priority raw - 1; policy accept; }",
    "add chain inet portward screen { type filter hook prerouting priority raw - 5; policy accept; }",
    "add rule inet portward absent accept",
    "add rule inet portward classify accept",
    "insert rule inet portward classify accept",
    "table inet portward { flags dormant; }",
    "add set inet portward deny4 { type iface_index . ipv4_addr; flags dynamic,timeout; timeout 60s; size 4; }",
    SMALL.replace("timeout 60s; size 4", "timeout 9s; size 9"),
    "flush ruleset",
    "nonsense",
    SMALL,
    SMALL.replace("raw - 2", "raw - 3"),
    rules("nftables", "closed.nft").read_text(),
]


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "empty"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_texts_do_the_same(sides: tuple[Side, Side], text: str, loaded: bool) -> None:
    for side in sides:
        if loaded:
            side.nft.load(SMALL)
    seen = [side.netlink.fingerprint(TABLE, ("epoch",)) for side in sides]
    dry, done = (same(sides, lambda side: side.nft.check(text)), same(sides, lambda side: side.nft.load(text)))
    assert dry[0] == done[0]
    now = [side.netlink.fingerprint(TABLE, ("epoch",)) for side in sides]
    assert (now[1] == seen[1], now[1] is None) == (now[0] == seen[0], now[0] is None)


def test_the_shipped_ruleset_is_loaded_changed_and_put_back_alike(namespace: str) -> None:
    with namespaces.inside(namespace):
        netlink = NfNetlink()
        nft = Nft(netlink, compiles=False)
        fake = FakeKernel(native=xtables.has_native_queue(nft))
        planes = Plane(fake, netlink=netlink, nft=nft), Plane(fake)
        steps: list[Callable[[Plane], object]] = [
            lambda plane: plane.start(),
            lambda plane: plane.check(),
            lambda plane: plane.nft.load("flush chain inet portward to_workers"),
            lambda plane: plane.check(),
            lambda plane: plane.nft.load("delete table inet portward"),
            lambda plane: (plane.reconciler.intact(), plane.check(), plane.reconciler.intact()),
            lambda plane: plane.nft.load(rules("nftables", "closed.nft").read_text()),
            lambda plane: (plane.reconciler.intact(), plane.check()),
            lambda plane: plane.reconciler.load(plane.want(plane.generation)),
            lambda plane: (plane.netlink.sets(TABLE), plane.netlink.hooks(TABLE), plane.cache.definitions()),
            lambda plane: plane.netlink.fingerprint(TABLE, FIXED_SETS) is None,
            lambda plane: (plane.cache.epoch(), plane.cache.synced(), plane.reconciler.repairs),
        ]
        for step in steps:
            before = [plane.netlink.generation() for plane in planes]
            kernel, faked = (step(plane) for plane in planes)
            assert faked == kernel
            risen = [plane.netlink.generation() - then for plane, then in zip(planes, before, strict=True)]
            assert risen[0] == risen[1]
        nft.load("flush ruleset")
        netlink.close()


def test_the_lock_of_a_namespace_is_the_same(sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    fake = sides[1].netlink._kernel  # type: ignore[attr-defined]
    for side, socket in zip(sides, (NfNetlink, fake.netlink), strict=True):
        monkeypatch.setattr(namespacelock, "NfNetlink", socket)
        side.nft.load(f"add table inet {LOCK_TABLE}")
        namespacelock.require(side.netlink)
        with NamespaceLock():
            found = namespacelock.holder(side.netlink)
            with pytest.raises(namespacelock.NamespaceTakenError) as second:
                NamespaceLock(0)
            side.nft.load("flush ruleset")
            with pytest.raises(KernelError, match="Operation not permitted"):
                side.nft.load(f"delete table inet {LOCK_TABLE}")
            assert str(namespacelock.holder(side.netlink)) == str(found)
        said.append((str(found), str(second.value), namespacelock.holder(side.netlink)))
    assert said[0] == said[1]
