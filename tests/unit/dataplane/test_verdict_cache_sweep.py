"""`VerdictCache.forget_within`: cached verdicts in changed prefixes go and others stay, whatever the kernel
refuses, or a reading misses."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network

import pytest

from portward.dataplane import verdict_cache as sweeping
from portward.dataplane.elements import Add, Change, Delete, DeleteRule, Flush, InsertRule, RefusedError
from portward.dataplane.names import COUNTED_SETS
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.setdump import SetElement, SetRow
from portward.dataplane.verdict_cache import Source, VerdictCache

LINK, OTHER = 7, 8
GENERATION = 4
REVOKED = ip_network("2001:db8:1::/64")


def key(number: int, network: str = "2001:db8:1::", link: int = LINK) -> bytes:
    return Source(link, (ip_address(network) + number).packed).key


def prefixes(*networks: object) -> Prefixes:
    found = Prefixes()
    for network in networks or (REVOKED,):
        found.add((LINK,), network)  # type: ignore[arg-type]
    return found


class Sets:
    """The kernel's sets as dictionaries: key → milliseconds until it expires. `readings` lists each set that was
    read, and `transactions` each commit. `disturb` may change the result of a reading."""

    def __init__(self) -> None:
        self.sets: dict[str, dict[bytes, int]] = {
            name + family: {} for name in COUNTED_SETS.values() for family in "46"
        }
        self.sets |= {"epoch": {}, "synced": {}, "rates4": {}, "rates6": {}, "gated": {}, "enforced": {}}
        self.rules: list[InsertRule] = []
        self.readings: list[str] = []
        self.transactions: list[list[Change]] = []
        self.full: set[str] = set()
        self.clock: Callable[[], float] = time.monotonic
        self.disturb: Callable[[str, list[SetRow]], list[SetRow]] = lambda set_, rows: rows
        self.before_commit: Callable[[list[Change]], None] = lambda changes: None

    def fill(self, set_: str, *keys: bytes, expires_ms: int = 60_000) -> None:
        self.sets[set_].update(dict.fromkeys(keys, expires_ms))

    def rows(self, set_: str) -> list[SetRow]:
        self.readings.append(set_)
        return self.disturb(set_, [(found, 1, expires) for found, expires in self.sets[set_].items()])

    def elements(self, set_: str) -> list[SetElement]:
        return [SetElement(*row) for row in self.rows(set_)]

    def element(self, set_: str, wanted: bytes) -> SetElement | None:
        expires = self.sets[set_].get(wanted)
        return None if expires is None else SetElement(wanted, 1, expires)

    def limits(self) -> list[str]:
        return []

    def rules_on(self, chain: str, set_: str) -> list[int]:
        return [place for place, rule in enumerate(self.rules) if (rule.chain, rule.set) == (chain, set_)]

    def now(self) -> float:
        return self.clock()

    def commit(self, changes: Iterable[Change]) -> None:
        changes = list(changes)
        self.before_commit(changes)
        sets = {name: dict(content) for name, content in self.sets.items()}
        for change in changes:
            match change:
                case Add(set_, keys):
                    if set_ in self.full and any(new not in sets[set_] for new in keys):
                        raise RefusedError(errno.ENFILE, "refused")
                    sets[set_] = dict.fromkeys(keys, 60_000) | sets[set_]
                case Delete(set_, keys):
                    for gone in keys:
                        if gone not in sets[set_]:
                            raise RefusedError(errno.ENOENT, "refused")
                        del sets[set_][gone]
                case Flush(set_):
                    sets[set_] = {}
                case InsertRule():
                    self.rules.insert(0, change)
                case DeleteRule(_, handle):
                    del self.rules[handle]
        self.sets = sets
        self.transactions.append(changes)

    def synced(self) -> int:
        """The number of the transaction that wrote `synced`, counted from 0."""
        (found,) = (at for at, changes in enumerate(self.transactions) if Flush("synced") in changes)
        return found


@pytest.fixture
def kernel() -> Sets:
    return Sets()


def test_what_lies_in_the_prefixes_goes_and_the_rest_stays(kernel: Sets) -> None:
    stay = key(1, "2001:db8:2::"), key(1, link=OTHER)
    for name in ("allow6", "observed6", "deny6", "refused6", "unknown6"):
        kernel.fill(name, key(1), key(2), *stay)
    kernel.fill("allow4", Source(LINK, bytes(4)).key)
    found = VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert found == {Source.of(key(1)), Source.of(key(2))}
    for name in ("allow6", "observed6", "deny6", "refused6", "unknown6"):
        assert set(kernel.sets[name]) == set(stay), name
    assert kernel.sets["allow4"], "nothing was revoked of IPv4"
    assert VerdictCache(kernel).synced() == GENERATION


def test_an_interface_that_is_gone_takes_both_families_with_it(kernel: Sets) -> None:
    kernel.fill("allow6", key(1), key(1, link=OTHER))
    kernel.fill("deny4", Source(LINK, bytes(4)).key)
    gone = Prefixes()
    gone.add_link(LINK)
    VerdictCache(kernel).forget_within(gone, GENERATION)
    assert (set(kernel.sets["allow6"]), kernel.sets["deny4"]) == ({key(1, link=OTHER)}, {})


@pytest.mark.parametrize("count", [1, 1_000, 10_000])
def test_each_set_is_read_twice_at_most_however_many_prefixes_change(kernel: Sets, count: int) -> None:
    many = [ip_network((int(REVOKED.network_address) + (number << 64), 64)) for number in range(count)]
    kernel.fill("allow6", *(key(number) for number in range(1_000)))
    VerdictCache(kernel).forget_within(prefixes(*many), GENERATION)
    assert not kernel.sets["allow6"]
    assert max(map(kernel.readings.count, kernel.readings)) <= 2


def test_passing_verdicts_go_first_and_synced_is_written_when_nothing_is_wrong_any_more(kernel: Sets) -> None:
    for name in ("allow6", "observed6", "deny6"):
        kernel.fill(name, key(1))
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    sets = [change.set for changes in kernel.transactions for change in changes if isinstance(change, Delete)]
    assert sets == ["allow6", "observed6", "deny6"]
    assert kernel.synced() == len(kernel.transactions) - 1


def test_denials_do_not_delay_a_change_that_lets_nothing_pass(kernel: Sets) -> None:
    kernel.fill("allow6", key(1))
    kernel.fill("deny6", key(1))
    VerdictCache(kernel).forget_within(prefixes(), GENERATION, opens=False)
    assert kernel.synced() == len(kernel.transactions) - 2
    assert not kernel.sets["allow6"]
    assert not kernel.sets["deny6"]


@pytest.mark.parametrize("set_", ["allow6", "deny6"])
def test_what_a_reading_misses_is_found_by_the_next(kernel: Sets, set_: str) -> None:
    """A reading in several messages skips elements if the kernel collects expired ones meanwhile."""
    keys = [key(number) for number in range(500)]
    kernel.fill(set_, *keys)
    kernel.disturb = lambda name, rows: rows[100:] if kernel.readings.count(name) == 1 else rows
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert not kernel.sets[set_]


def test_a_reading_that_found_nothing_is_not_believed_alone(kernel: Sets) -> None:
    kernel.fill("allow6", key(1), *(key(number, "2001:db8:2::") for number in range(500)))
    kernel.disturb = lambda name, rows: rows[1:] if kernel.readings.count(name) == 1 else rows
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert key(1) not in kernel.sets["allow6"]
    assert len(kernel.sets["allow6"]) == 500


def test_a_set_that_is_resized_all_the_time_is_flushed(kernel: Sets) -> None:
    """An element that is there twice shows that the kernel moved the elements during the reading."""
    kernel.fill("allow6", *(key(number, "2001:db8:2::") for number in range(500)))
    kernel.disturb = lambda name, rows: [*rows, *rows[:1]]
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert not kernel.sets["allow6"]


def test_readings_too_far_apart_are_not_believed(kernel: Sets) -> None:
    """The kernel collects expired elements once a second, which may have disturbed both readings."""
    clock = iter(range(1_000_000))
    kernel.clock = lambda: float(next(clock))
    kernel.fill("allow6", *(key(number, "2001:db8:2::") for number in range(500)))
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert not kernel.sets["allow6"]


def test_an_element_that_expires_before_it_is_deleted_stops_nothing(kernel: Sets) -> None:
    kernel.fill("allow6", *(key(number) for number in range(10)), expires_ms=3)

    def expire(changes: list[Change]) -> None:
        if any(isinstance(change, Delete) for change in changes):
            kernel.sets["allow6"].pop(key(5), None)

    kernel.before_commit = expire
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert not kernel.sets["allow6"]
    assert Flush("allow6") not in [change for changes in kernel.transactions for change in changes]


def test_an_element_that_vanishes_unexpectedly_makes_the_set_be_read_again(kernel: Sets) -> None:
    stay = key(1, "2001:db8:2::")
    kernel.fill("allow6", stay, *(key(number) for number in range(10)))
    left = iter(range(3))

    def vanish(changes: list[Change]) -> None:
        if any(isinstance(change, Delete) and change.set == "allow6" for change in changes):
            kernel.sets["allow6"].pop(key(next(left, 99)), None)

    kernel.before_commit = vanish
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert set(kernel.sets["allow6"]) == {stay}


def test_a_set_from_which_nothing_can_be_deleted_is_flushed(kernel: Sets) -> None:
    kernel.fill("allow6", key(1), key(1, "2001:db8:2::"))

    def refuse(changes: list[Change]) -> None:
        if any(isinstance(change, Delete) for change in changes):
            raise RefusedError(errno.EBUSY, "refused")

    kernel.before_commit = refuse
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert not kernel.sets["allow6"]
    assert VerdictCache(kernel).synced() == GENERATION


def test_a_flush_that_is_refused_is_an_error_and_nothing_is_said_to_be_synced(kernel: Sets) -> None:
    kernel.fill("allow6", key(1))

    def refuse(changes: list[Change]) -> None:
        raise RefusedError(errno.ENOBUFS, "refused")

    kernel.before_commit = refuse
    with pytest.raises(RefusedError):
        VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert kernel.sets["synced"] == {}


def test_a_set_of_which_nearly_everything_goes_is_flushed_without_another_reading(kernel: Sets) -> None:
    kernel.fill("allow6", key(1, "2001:db8:2::"), *(key(number) for number in range(5_000)))
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert not kernel.sets["allow6"]
    assert kernel.readings.count("allow6") == 1


def test_of_a_set_of_which_half_goes_the_other_half_stays(kernel: Sets) -> None:
    kernel.fill("allow6", *(key(number) for number in range(5_000)))
    kernel.fill("allow6", *(key(number, "2001:db8:2::") for number in range(5_000)))
    VerdictCache(kernel).forget_within(prefixes(), GENERATION)
    assert len(kernel.sets["allow6"]) == 5_000


@pytest.mark.parametrize(
    ("count", "size", "flushed"), [(1, 100_001, True), (1, 40_000, False), (300, 40_000, True)]
)
def test_a_set_too_large_to_be_read_in_time_is_flushed_unread(
    kernel: Sets, count: int, size: int, flushed: bool
) -> None:
    many = [ip_network((int(REVOKED.network_address) + (number << 64), 64)) for number in range(count)]
    kernel.fill("allow6", key(1), *(key(number, "2001:db8:1:ffff::") for number in range(99)))
    cache = VerdictCache(kernel)
    cache.sizes["allow6"] = size
    cache.forget_within(prefixes(*many), GENERATION)
    assert len(kernel.sets["allow6"]) == (0 if flushed else 99)
    assert ("allow6" in kernel.readings) is not flushed


@pytest.mark.parametrize("count", [3, 600])
def test_single_sources_go_also_from_full_sets(kernel: Sets, count: int) -> None:
    stay = key(1, "2001:db8:2::")
    kernel.fill("allow6", stay, *(key(number) for number in range(count)))
    kernel.full = {"allow6", "deny6"}
    VerdictCache(kernel).forget([Source.of(key(number)) for number in range(count)], GENERATION)
    assert set(kernel.sets["allow6"]) == {stay}
    assert not kernel.sets["deny6"]
    assert VerdictCache(kernel).synced() == GENERATION


def test_a_set_that_turns_out_to_be_huge_is_read_once_and_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first reading, for instance after a start, its size is unknown. Each reading takes seconds."""
    monkeypatch.setattr(sweeping, "_MAX_READ_ELEMENTS", 10)
    monkeypatch.setattr(sweeping, "_SNAPSHOT_ELEMENTS", 5)
    sets = Sets()
    sets.fill("allow6", *(key(number, "2001:db8:2::") for number in range(11)))
    VerdictCache(sets).forget_within(prefixes(), GENERATION)
    assert sets.readings.count("allow6") == 1
    assert sets.sets["allow6"] == {}
