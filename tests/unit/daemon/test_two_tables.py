"""A gateway whose kernel takes the table `bridge`, too: both tables follow the policy, whatever happens to one of
them or between the two."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import pytest

from portward.config.keys import Bridge, UnknownFrames
from portward.dataplane.desired import NOTHING
from portward.dataplane.fake import FakeKernel, ProcessDied
from portward.dataplane.faketables import FakeTable
from portward.dataplane.links import Device
from portward.dataplane.names import CLOSED, TABLE, VERDICT_SETS, KernelTable
from portward.dataplane.nfnetlink import KernelElements
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.reconciler import close, closed, loaded
from portward.dataplane.selfcheck import DifferenceKind
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.errors import KernelError
from portward.ipc.mark import PASSING, Class, epoch_of
from portward.model import RateLimit
from portward.ops import host
from portward.ops.diagnosis import recent_drops
from portward.ops.host_state import CachedState
from portward.policy import presets
from unit.daemon.test_core import ALLOWED, DENIED, LINKS, MAY_NOT, RECORDS, Ground, exemption, subscription

INET, BRIDGE = KernelTable
KEYS: Final = {INET: TABLE, BRIDGE: f"bridge {TABLE}"}
# More transactions than any step makes.
_WRITES: Final = 16


class Two(Ground):
    """A gateway with both tables."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch, bridge=True)

    def table(self, table: KernelTable) -> FakeTable:
        """A table in the kernel."""
        return self.kernel.tables[KEYS[table]]

    def caches(self, table: KernelTable) -> VerdictCache:
        """The cached verdicts of a table."""
        return VerdictCache(KernelElements(self.kernel.netlink().of(table)))

    def passing(self, table: KernelTable) -> set[Source]:
        """The sources that a table lets pass."""
        return passing(self.kernel.tables, table)

    def both_learn(self, *sources: Source) -> None:
        """Both tables cache what the policy says."""
        for source in sources:
            verdict = Class.ALLOW if source.link == 3 else Class.DENY
            for key in KEYS.values():
                self.kernel.learn(VERDICT_SETS[verdict] + source.family, source.key, table=key)

    def both_in_step(self) -> bool:
        """Whether all cached verdicts of both tables agree with the policy table."""
        now = self.core.generation
        caches = [self.caches(table) for table in KernelTable]
        return all((one.epoch(), one.synced()) == (epoch_of(now), now) for one in caches)


def passing(tables: dict[str, FakeTable], table: KernelTable) -> set[Source]:
    """The sources that a table lets pass by a cached verdict."""
    if KEYS[table] not in tables:
        return set()
    sets = tables[KEYS[table]].sets
    return {
        Source.of(key) for one in PASSING for family in "46" for key in sets[VERDICT_SETS[one] + family].elements
    }


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    """It enforces, with two cached verdicts in each table."""
    found = Two(tmp_path, monkeypatch)
    found.start()
    found.both_learn(ALLOWED, DENIED)
    yield found
    found.core.close()


# --- the start ---


def test_both_tables_have_the_rules_and_name_all_segments(two: Two) -> None:
    """An interface may move into a bridge and out of it."""
    for table in KernelTable:
        assert two.table(table).chains["screen"].rules
        assert any('iifname != { "vni*" }' in rule for rule in two.table(table).chains["classify"].rules)
    assert two.both_in_step()
    assert two.core.at_rest()
    assert two.core.dataplane.bridged


def test_a_kernel_that_takes_no_queue_in_a_bridge_gets_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground = Ground(tmp_path, monkeypatch)
    ground.start()
    assert not ground.core.dataplane.bridged
    assert set(ground.kernel.tables) == {TABLE}
    ground.core.close()


def test_if_the_kernel_refuses_the_second_table_nothing_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Two(tmp_path, monkeypatch)
    two.core.intake.first_policy()
    two.core.first_links(LINKS)
    refuse = KernelError("no such expression")
    reconciler = two.core.dataplane.tables[1].reconciler

    def refused(_: object) -> None:
        raise refuse

    monkeypatch.setattr(reconciler, "check", refused)
    with pytest.raises(KernelError, match="no such expression"):
        two.core.load()
    assert not two.kernel.tables
    two.core.close()


def test_a_restart_keeps_what_is_cached_in_both(two: Two) -> None:
    two.restart()
    for table in KernelTable:
        assert two.passing(table) == {ALLOWED}
    assert two.both_in_step()


@pytest.mark.parametrize("bridge", [True, False])
def test_what_stands_in_for_either_table_is_lifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, bridge: bool
) -> None:
    """Also on a kernel that takes the table `bridge`, and no queue in it: nothing would ever lift it."""
    ground = Ground(tmp_path, monkeypatch, bridge=True)
    if not bridge:
        monkeypatch.setattr("portward.daemon.core.xtables.has_native_queue", lambda _, table=INET: table is INET)
        ground.core.close()
        ground.core = ground.made()
    for table in KernelTable:
        close(ground.kernel.nft(), (25,), table)
    ground.start()
    assert not [name for name in ground.kernel.tables if CLOSED in name]
    assert ground.core.dataplane.bridged is bridge
    close(ground.kernel.nft(), (25,), BRIDGE)
    ground.core.dataplane.check()
    assert not closed(ground.kernel.netlink().of(BRIDGE))
    ground.core.close()


# --- changes ---


def test_a_revoked_source_is_forgotten_in_both(two: Two) -> None:
    two.remove(RECORDS[2])
    two.core.intake.sync()
    for table in KernelTable:
        assert two.passing(table) == set()
    assert two.both_in_step()
    assert two.core.dataplane.enforced == two.core.revision


def test_other_interfaces_take_their_verdicts_with_them_in_both(two: Two) -> None:
    two.core.dataplane.unsettle(frozenset({3}), 1)
    for table in KernelTable:
        assert two.passing(table) == set()
        assert list(two.table(table).sets["unsettled"].elements) == [(3).to_bytes(4, "little")]
    two.core.intake.links_changed(LINKS._replace(touched=frozenset({3})), 1)
    for table in KernelTable:
        assert not two.table(table).sets["unsettled"].elements


def test_a_rate_limit_stands_in_both_and_goes_from_both(two: Two) -> None:
    """A worker does not report in which of them it has met the source."""
    two.put(exemption(MAY_NOT, RateLimit(per_minute=10, burst=2)))
    two.core.intake.sync()
    two.core.dataplane.install_limits([DENIED])
    netlinks = [two.kernel.netlink().of(table) for table in KernelTable]

    def limits() -> list[dict[Source, object]]:
        return [dict(RateLimits.sources_in_kernel(KernelElements(one))) for one in netlinks]

    assert [list(found) for found in limits()] == [[DENIED], [DENIED]]
    two.remove(exemption(MAY_NOT, None))
    two.core.intake.sync()
    assert limits() == [{}, {}]
    two.core.dataplane.sync_rate_limits()
    assert [one.limits(TABLE) for one in netlinks] == [[], []]


def test_another_configuration_is_loaded_in_both(two: Two) -> None:
    config = msgspec.structs.replace(two.config, bridge=Bridge(unknown_frames=UnknownFrames.PASS))
    assert two.table(BRIDGE).chains["unknown_frame"].rules
    two.core.intake.reload(config, two.core.dataplane.preset)
    assert not two.table(BRIDGE).chains["unknown_frame"].rules
    assert two.passing(BRIDGE) == {ALLOWED}, "what is cached stays"


def test_a_configuration_that_only_the_second_table_refuses_is_refused(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> None:
        raise KernelError("no")

    monkeypatch.setattr(two.core.dataplane.tables[1].reconciler, "check", refused)
    written = len(two.kernel.journal)
    with pytest.raises(KernelError):
        two.core.intake.reload(two.config, presets.load("aws"))
    assert len(two.kernel.journal) == written


# --- surroundings ---

PORT: Final = LINKS._replace(devices=(Device(3, "vni1", master=8), Device(8, "br0", "bridge")))
MACVLAN: Final = LINKS._replace(devices=(Device(3, "vni1"), Device(8, "top", "macvlan", lower=3)))


def known(two: Two, table: KernelTable) -> set[int]:
    """The known interfaces of a table."""
    return {int.from_bytes(key, "little") for key in two.table(table).sets["known_interfaces"].elements}


def test_a_bridge_above_a_segment_takes_nothing_from_it(two: Two) -> None:
    two.core.dataplane.links_seen(PORT)
    assert two.core.dataplane.lookout.warnings == []
    assert "stacked" not in two.table(INET).chains
    assert [known(two, table) for table in KernelTable] == [{8}, {8}], "its packets have verdicts"


def test_mail_of_another_device_above_a_segment_passes_no_bridge_either(two: Two) -> None:
    two.core.dataplane.links_seen(MACVLAN)
    assert two.table(INET).chains["stacked"].rules
    assert "stacked" not in two.table(BRIDGE).chains
    assert [known(two, table) for table in KernelTable] == [{8}, set()]


def test_a_guard_that_comes_loads_nothing_for_bridges(two: Two) -> None:
    two.kernel.load("table inet theirs {\n chain c { type nat hook prerouting priority -100; }\n}\n")
    two.core.dataplane.check()
    assert two.core.dataplane.guarded
    assert "guard" in two.table(INET).chains
    assert "guard" not in two.table(BRIDGE).chains


# --- repairs ---


@pytest.mark.parametrize("table", KernelTable)
@pytest.mark.parametrize("how", ["flush table {}", "delete table {}", "flush chain {} learn"])
def test_either_table_is_put_back_alone(two: Two, table: KernelTable, how: str) -> None:
    other = next(one for one in KernelTable if one is not table)
    two.kernel.load(how.format(table))
    assert not two.core.at_rest()
    two.core.dataplane.check()
    assert two.table(table).chains["learn"].rules
    assert two.passing(table) == set(), "its sets may have been changed, too"
    assert two.passing(other) == {ALLOWED}
    assert two.core.dataplane.repairs == 1
    assert two.core.selfcheck.divergences[DifferenceKind.RULESET] == 1
    assert two.core.at_rest()


def test_a_table_that_cannot_be_put_back_keeps_no_change_from_the_other(two: Two) -> None:
    two.kernel.load("delete table bridge portward")
    two.kernel.refuse(errno.ENOMEM, times=3)
    two.core.dataplane.check()
    assert two.core.dataplane.broken
    two.kernel._faults.clear()
    two.kernel.bridge = False  # from now on the kernel refuses the table
    two.remove(RECORDS[2])
    two.core.intake.sync()
    assert two.passing(INET) == set()
    assert two.core.dataplane.enforced < two.core.revision, "bridges do not act on it"
    two.kernel.bridge = True
    two.core.dataplane.check()
    assert two.core.dataplane.broken == ""
    assert two.both_in_step()
    assert two.core.dataplane.enforced == two.core.revision


def test_an_unexpected_error_in_one_table_keeps_no_change_from_the_other(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    inet, _ = two.core.dataplane.tables

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(inet.cache, "move_epoch", fails)
        two.remove(RECORDS[2])
        two.core.intake.sync()
    assert two.passing(BRIDGE) == set()
    assert two.core.dataplane.broken == "MemoryError: "
    two.core.dataplane.check()
    assert two.both_in_step()


def test_a_cached_verdict_that_is_not_the_tables_is_found_in_either(two: Two) -> None:
    two.kernel.learn("allow4", DENIED.key, table=KEYS[BRIDGE])
    two.core.count(1.0)
    assert two.core.counting.suspects() == [DENIED]
    two.core.dataplane.correct([DENIED])
    assert two.passing(BRIDGE) == {ALLOWED}
    assert two.core.selfcheck.divergences[DifferenceKind.CACHED] == 1


# --- the process dies ---


class Step(NamedTuple):
    """`act` happens, and afterwards the policy lets these of ALLOWED and DENIED pass."""

    name: str
    act: Callable[[Two], None]
    passes: frozenset[Source]


def revoked(two: Two) -> None:
    """The prefix of the allowed source has no owner any more."""
    two.remove(RECORDS[2])
    two.core.intake.sync()


def exchanged(two: Two) -> None:
    """The two subscriptions change places: one may send no longer, the other may."""
    two.put(subscription(RECORDS[0].id, "pay-as-you-go"), subscription(MAY_NOT, "enterprise-agreement"))
    two.core.intake.sync()


def damaged(two: Two) -> None:
    """Another program takes all rules, and a revocation follows."""
    two.kernel.load("flush ruleset")
    revoked(two)


def elsewhere(two: Two) -> None:
    """The interfaces have exchanged their indexes."""
    two.core.dataplane.unsettle(frozenset({3, 4}), 1)
    two.core.intake.links_changed(LINKS._replace(names={3: "vni2", 4: "vni1"}, touched=frozenset({3, 4})), 1)


def surrounded(two: Two) -> None:
    """A tunnel ends here, so both rulesets are loaded."""
    two.core.dataplane.surround(NOTHING._replace(tunnel_ports=frozenset({7777})))


STEPS: Final = (
    Step("revoked", revoked, frozenset()),
    Step("exchanged", exchanged, frozenset((DENIED,))),
    Step("damaged", damaged, frozenset()),
    Step("elsewhere", elsewhere, frozenset((Source(4, DENIED.address),))),
    Step("surrounded", surrounded, frozenset((ALLOWED,))),
)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_after_a_death_at_any_write_the_next_start_brings_both_in_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step
) -> None:
    """Also between the writes to the one table and those to the other. At no moment does a table let a source pass
    that the policy lets pass neither before nor after."""
    for place in range(1, _WRITES):
        folder = tmp_path / str(place)
        folder.mkdir()
        two = Two(folder, monkeypatch)
        two.start()
        two.both_learn(ALLOWED, DENIED)
        two.kernel.history.clear()
        two.kernel.die(place)
        died = True
        try:
            step.act(two)
            died = False
        except ProcessDied:
            pass
        two.kernel.die(None)
        for tables in two.kernel.history:
            for table in KernelTable:
                assert passing(tables, table) <= step.passes | {ALLOWED}
        if step is STEPS[3]:
            monkeypatch.setattr(
                "unit.daemon.test_core.LINKS", LINKS._replace(names={3: "vni2", 4: "vni1", 9: "up0"})
            )
        two.restart()
        for table in KernelTable:
            assert two.passing(table) <= step.passes, f"{table} after write {place}"
            assert loaded(two.kernel.netlink().of(table))
        assert two.both_in_step()
        two.core.dataplane.check()
        assert two.core.dataplane.repairs == 0
        two.core.close()
        monkeypatch.undo()
        if not died:
            return
    pytest.fail(f"more than {_WRITES} writes")


# --- counts ---


def segments(two: Two) -> dict[tuple[str, str], int]:
    """The sums by segment and verdict."""
    return {key: number for key, number in two.core.counting.counts.segments.items() if number}


def test_packets_of_both_tables_are_summed(two: Two) -> None:
    two.kernel.learn("allow4", ALLOWED.key, packets=5)
    two.kernel.learn("allow4", ALLOWED.key, packets=7, table=KEYS[BRIDGE])
    two.kernel.learn("unjudged_drops", (4).to_bytes(4, "little"), packets=2, table=KEYS[BRIDGE])
    two.core.count(1.0)
    assert segments(two) == {("vni1", "allow"): 12, ("vni2", "unjudged"): 2}
    assert two.core.counting.cached_sources[Class.ALLOW] == 2
    two.core.count(1.0)
    assert segments(two)["vni1", "allow"] == 12, "each once"


def test_what_a_deletion_in_the_second_table_had_counted_is_counted(two: Two) -> None:
    two.core.count(1.0)
    two.kernel.learn("allow4", ALLOWED.key, packets=5, table=KEYS[BRIDGE])
    revoked(two)
    two.core.count(1.0)
    assert segments(two)["vni1", "allow"] == 5


def test_an_element_that_is_about_to_expire_is_deleted_from_its_own_table(two: Two) -> None:
    due = two.core.count(3_600.0)
    assert due is not None
    assert {name for name, keys in due.items() if ALLOWED.key in keys} == {"allow4", "bridge allow4"}
    two.core.dataplane.delete_expiring({"bridge allow4": [ALLOWED.key]})
    assert two.passing(BRIDGE) == set()
    assert two.passing(INET) == {ALLOWED}


def test_a_restart_counts_nothing_twice_in_either_table(two: Two) -> None:
    two.kernel.learn("allow4", ALLOWED.key, packets=5)
    two.kernel.learn("allow4", ALLOWED.key, packets=7, table=KEYS[BRIDGE])
    two.core.count(1.0)
    two.restart()
    two.core.count(1.0)
    assert segments(two) == {("vni1", "allow"): 12}


def test_a_table_that_is_new_begins_its_counts_anew_and_the_other_does_not(two: Two) -> None:
    """An agent of an older version had only one table."""
    two.kernel.learn("allow4", ALLOWED.key, packets=5)
    two.kernel.learn("allow4", ALLOWED.key, packets=7, table=KEYS[BRIDGE])
    two.core.count(1.0)
    two.core.close()
    two.kernel.load("delete table bridge portward")
    two.core = two.made()
    two.start()
    two.kernel.learn("allow4", ALLOWED.key, packets=8, table=KEYS[BRIDGE])
    two.core.count(1.0)
    assert segments(two)["vni1", "allow"] == 20


def test_named_counters_and_misses_over_a_limit_are_summed(two: Two) -> None:
    for table, number in zip(KernelTable, (3, 4), strict=True):
        two.table(table).counters["missed"] = number
        two.kernel.learn("limited_segments", (3).to_bytes(4, "little"), packets=number, table=KEYS[table])
    assert two.core.counting.screen()["missed"] == 7
    assert two.core.limited() == {"vni1": 7}
    two.kernel.load("delete table bridge portward")
    assert two.core.counting.screen() == {}, "a part would look like a counter that falls"
    assert two.core.limited() == {"vni1": 7}, "a counter does not fall"


# --- verbs ---


def test_explain_finds_a_verdict_in_either_table(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "NfNetlink", two.kernel.netlink)
    address = ip_address("10.0.0.77")
    assert host.cached({"vni1": 3}, address) == CachedState()
    two.kernel.learn("allow4", Source(3, address.packed).key, packets=4, table=KEYS[BRIDGE])
    found = host.cached({"vni1": 3}, address)
    assert found is not None
    assert (found.verdict, found.packets) == (Class.ALLOW, 4)
    assert host.bridged()
    two.kernel.load("delete table bridge portward")
    assert host.cached({"vni1": 3}, address) == CachedState()
    assert not host.bridged()
    two.kernel.load("delete table inet portward")
    assert host.cached({"vni1": 3}, address) == CachedState(loaded=False)


def test_diagnose_counts_drops_of_both_tables(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_drops, "NfNetlink", two.kernel.netlink)
    for number, key in zip((3, 4), KEYS.values(), strict=True):
        two.kernel.learn("deny4", DENIED.key, packets=number, table=key)
    reading = recent_drops._Reading(recent_drops._loaded(two.kernel.netlink()), lambda *_: None, lambda _: (4,))
    assert reading._of_source(DENIED).refused == 7


def test_the_fake_kernel_without_such_tables_takes_none() -> None:
    kernel = FakeKernel()
    with pytest.raises(KernelError, match="No such file"):
        kernel.load("table bridge t { chain c { type filter hook prerouting priority 0; }; }")
    kernel.load("table inet t { chain c { type filter hook prerouting priority 0; }; }")
