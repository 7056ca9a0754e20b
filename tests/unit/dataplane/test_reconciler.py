"""The ruleset is loaded, checked and repaired: which writes form one transaction, and which changes are those of
another program."""

from __future__ import annotations

import errno
import time
from typing import cast

import msgspec
import pytest

from portward.config.keys import Verdicts
from portward.dataplane import reconciler
from portward.dataplane.fake import FakeKernel, FakeNetlink, FakeNft, ProcessDied
from portward.dataplane.monitor import NOTHING, RulesetChanges
from portward.dataplane.names import FIXED_SETS, HOOKS, TABLE, TUNNELS_HOOKS
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.sync import KernelSync
from portward.errors import KernelError
from portward.ipc.mark import Class
from unit.dataplane.grounds import CONFIG, Plane, source, words

HOST = source("10.0.0.4")


@pytest.fixture
def plane() -> Plane:
    """A gateway that enforces, on a kernel with nft_queue."""
    found = Plane(FakeKernel())
    found.start()
    found.kernel.journal.clear()
    return found


def test_a_ruleset_is_one_transaction_with_nft_queue_and_two_without() -> None:
    for native, expected in ((True, ["load the ruleset"]), (False, ["load the ruleset", "add rule portward"])):
        found = Plane(FakeKernel(native=native))
        found.reconciler.load(found.want(found.generation))
        assert words(found.kernel.journal) == expected
        assert found.kernel.tables[TABLE].chains["to_workers"].rules


def test_a_refused_queue_statement_leaves_nothing_where_nothing_was() -> None:
    kernel = FakeKernel(native=False, xtables=False)
    with pytest.raises(KernelError, match="does not take the target NFQUEUE"):
        Plane(kernel).start()
    assert not kernel.tables


def test_a_refused_queue_statement_beside_an_older_ruleset_leaves_unknown_sources_dropped(plane: Plane) -> None:
    plane.kernel.native = plane.kernel.xtables = False
    again = Plane(plane.kernel)
    with pytest.raises(KernelError):
        again.start()
    assert TABLE in plane.kernel.tables
    assert not plane.kernel.tables[TABLE].chains["to_workers"].rules
    assert not again.reconciler.intact(), "it is tried again"
    plane.kernel.xtables = True
    again.reconciler.repair(again.want(again.generation))
    assert plane.kernel.tables[TABLE].chains["to_workers"].rules


def test_a_process_that_dies_before_the_queue_statement_leaves_a_closed_ruleset() -> None:
    kernel = FakeKernel(native=False)
    kernel.die(1)
    with pytest.raises(ProcessDied):
        Plane(kernel).start()
    chains = kernel.tables[TABLE].chains
    assert chains["screen"].rules
    assert not chains["to_workers"].rules


def test_a_load_again_keeps_what_is_cached_and_stays_the_same_for_the_watcher(plane: Plane) -> None:
    plane.learn(Class.ALLOW, HOST)
    plane.reconciler.load(plane.want(plane.generation))
    assert set(plane.cached()) == {HOST}
    assert plane.reconciler.intact()
    assert plane.reconciler.repairs == 0


def test_other_definitions_of_the_sets_cost_what_was_cached(plane: Plane) -> None:
    plane.learn(Class.ALLOW, HOST)
    plane.config = msgspec.structs.replace(CONFIG, verdicts=Verdicts(allow_seconds=30))
    plane.reconciler.load(plane.want(plane.generation))
    assert not plane.cached()
    assert plane.kernel.tables[TABLE].sets["allow4"].timeout_ms == 30_000
    assert plane.reconciler.intact()


def test_sets_and_chains_of_an_older_ruleset_are_replaced() -> None:
    kernel = FakeKernel()
    kernel.load(
        "table inet portward {\n set segments { type ifname; flags interval; elements = { vni* } }\n"
        " set definitions { typeof meta mark; elements = { 4711 } }\n"
        " set allow4 { type ipv4_addr; }\n"
        " chain screen { type filter hook prerouting priority raw - 1; policy accept; }\n"
        " chain theirs { type filter hook prerouting priority 5; policy accept; }\n}\n"
    )
    found = Plane(kernel)
    found.start()
    assert "segments" not in found.netlink.sets(TABLE)
    assert list(found.netlink.hooks(TABLE).items()) == list((HOOKS | TUNNELS_HOOKS).items())
    assert kernel.tables[TABLE].sets["allow4"].size == 262_144


# --- another program ---


CHANGED = {
    "flush ruleset": "flush ruleset",
    "the table": "delete table inet portward",
    "a chain flushed": "flush chain inet portward verdict",
    "a rule more": 'insert rule inet portward screen iifname "vni1" accept',
    "a rule in to_workers": "add rule inet portward to_workers accept",
    "made dormant": "table inet portward { flags dormant; }",
    "a fixed set": "flush set inet portward internal4",
    "the definitions": "flush set inet portward definitions",
    "a chain more": "add chain inet portward theirs { type filter hook forward priority 0; }",
    "closed": "table inet portward_closed { chain forward { type filter hook forward priority filter - 5; } }",
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_another_program_changed_is_seen_and_put_back(plane: Plane, what: str) -> None:
    before = plane.netlink.fingerprint(TABLE, FIXED_SETS)
    assert plane.reconciler.at_rest(plane.netlink)
    plane.kernel.load(CHANGED[what])
    assert not plane.reconciler.at_rest(plane.netlink)
    assert not plane.reconciler.intact()
    assert not plane.check()
    assert plane.reconciler.repairs == 1
    assert plane.check()
    assert "portward_closed" not in plane.kernel.tables
    if what not in ("a chain more",):
        assert plane.netlink.fingerprint(TABLE, FIXED_SETS) == before


def test_each_time_is_in_the_log(plane: Plane, caplog: pytest.LogCaptureFixture) -> None:
    for times in (1, 2):
        plane.kernel.load(CHANGED["a chain flushed"])
        assert not plane.check()
        assert caplog.text.count("it is put back (repair") == times


def test_the_epoch_moved_by_another_program_is_put_back(plane: Plane) -> None:
    plane.kernel.load("flush set inet portward epoch\nadd element inet portward epoch { 0x80 }")
    assert not plane.check()
    assert plane.cache.epoch() == 1


def test_rules_of_others_that_leave_ours_alone_cost_one_look_and_no_repair(plane: Plane) -> None:
    plane.kernel.load("table inet theirs { chain forward { type filter hook forward priority 0; } }")
    assert not plane.reconciler.at_rest(plane.netlink)
    assert plane.check()
    assert plane.reconciler.at_rest(plane.netlink)
    assert plane.reconciler.repairs == 0


def test_a_transaction_of_others_within_ours_is_noticed(plane: Plane) -> None:
    plane.kernel.meanwhile(lambda: plane.kernel.load("flush chain inet portward verdict"))
    plane.cache.move_epoch(1)
    assert plane.netlink.disturbed
    assert not plane.check()


def test_a_transaction_of_ours_that_changes_nothing_is_not_taken_for_anothers(plane: Plane) -> None:
    before = plane.kernel.generation
    plane.nft.load("add table inet portward")
    assert plane.kernel.generation == before
    assert plane.reconciler.intact()


def test_what_no_number_shows_is_found_by_the_next_look(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.kernel.tables[TABLE].chains["verdict"].rules.clear()
    assert plane.reconciler.intact(), "the generation is as it was left"
    now = time.monotonic() + reconciler._LOOK_INTERVAL_S
    monkeypatch.setattr("portward.dataplane.reconciler.time.monotonic", lambda: now)
    assert not plane.reconciler.at_rest(plane.netlink)
    assert not plane.reconciler.intact()


def test_the_number_of_transactions_may_wrap(plane: Plane) -> None:
    plane.kernel.generation = 2**32 - 1
    plane.check()
    plane.cache.move_epoch(1)
    assert plane.kernel.generation < 10
    assert plane.check()


def test_a_program_that_writes_all_the_time_is_named_as_the_reason(plane: Plane) -> None:
    for after in range(20):
        plane.kernel.meanwhile(lambda: plane.kernel.load("add chain inet portward cached6"), after=2 * after)
    with pytest.raises(KernelError, match="changes faster than it can be loaded"):
        plane.reconciler.load(plane.want(plane.generation))


def test_a_ruleset_that_the_kernel_would_not_take_is_refused_before_anything_changes(plane: Plane) -> None:
    broken = plane.want(plane.generation)._replace(
        text=plane.want(plane.generation).text + "add rule inet portward absent accept\n"
    )
    with pytest.raises(KernelError, match="No such file or directory"):
        plane.reconciler.check(broken)
    with pytest.raises(KernelError, match="No such file or directory"):
        plane.reconciler.load(broken)
    assert plane.kernel.tables[TABLE].chains["screen"].rules
    assert plane.reconciler.intact(), "the ruleset before is there, whole"
    assert words(plane.kernel.journal) == []


# --- with notices ---


class Compiling(FakeNft):
    """An nft whose transactions all come from a socket of portward."""

    compiles = True


class Hearing:
    """A reconciler with notices of changes, which a test sets in `heard`."""

    def __init__(self, plane: Plane) -> None:
        self.heard = NOTHING
        plane.nft = Compiling(plane.kernel, cast(FakeNetlink, plane.netlink))
        plane.reconciler = RulesetReconciler(plane.nft, plane.netlink, plane.cache, self.read)
        plane.sync = KernelSync(plane.reconciler, plane.cache, plane.rate_limits, lambda _: None, native=True)
        plane.start()

    def read(self) -> RulesetChanges:
        """The changes that were set since the last call."""
        found, self.heard = self.heard, NOTHING
        return found


def test_with_notices_changes_of_others_between_ours_are_no_reason_to_look(plane: Plane) -> None:
    """The kernel's generation also counts the transactions of other programs. If one changes its rules all the
    time, each transaction of portward would otherwise cause ten seconds of checks."""
    Hearing(plane)
    plane.kernel.load("table inet theirs { }")
    plane.cache.move_epoch(1)
    assert plane.reconciler.at_rest(plane.netlink, NOTHING)
    assert plane.reconciler.at_rest(plane.netlink)


def test_with_notices_a_load_that_the_kernel_refused_is_a_reason_to_look(plane: Plane) -> None:
    Hearing(plane)
    plane.kernel.refuse(errno.ENOMEM)
    with pytest.raises(KernelError):
        plane.reconciler.load(plane.want(plane.generation))
    assert not plane.reconciler.at_rest(plane.netlink, NOTHING)
    assert plane.reconciler.intact(), "nothing has changed"
    assert plane.reconciler.at_rest(plane.netlink, NOTHING)


def test_with_notices_what_others_write_into_ours_is_seen(plane: Plane) -> None:
    hearing = Hearing(plane)
    plane.kernel.load("flush chain inet portward verdict")
    hearing.heard = RulesetChanges(ours=True, others=True)
    assert not plane.reconciler.at_rest(plane.netlink, hearing.heard)
    assert not plane.reconciler.intact()


# --- without an agent ---


def test_a_baseline_begins_only_where_no_ruleset_is(plane: Plane) -> None:
    with pytest.raises(KernelError, match="File exists"):
        reconciler.begin(plane.nft, plane.want(plane.generation))
    kernel = FakeKernel()
    other = Plane(kernel)
    reconciler.begin(other.nft, other.want(other.generation))
    assert len(kernel.journal) == 1
    assert reconciler.loaded(other.netlink)


def test_a_closed_port_is_lifted_in_the_transaction_after_the_ruleset() -> None:
    found = Plane(FakeKernel())
    reconciler.close(found.nft, (25,))
    assert reconciler.closed(found.netlink)
    found.kernel.journal.clear()
    found.start()
    assert words(found.kernel.journal)[:2] == ["load the ruleset", "delete table inet portward_closed"]
    assert not reconciler.closed(found.netlink)


def test_a_closed_port_stays_while_the_ruleset_is_refused() -> None:
    found = Plane(FakeKernel())
    reconciler.close(found.nft, (25,))
    found.kernel.refuse(errno.ENOMEM)
    with pytest.raises(KernelError):
        found.start()
    assert reconciler.closed(found.netlink)


def test_remove_takes_both_tables_and_leaves_those_of_others(plane: Plane) -> None:
    plane.kernel.load("add table inet theirs")
    reconciler.close(plane.nft, (25,))
    assert reconciler.remove(plane.nft, plane.netlink)
    assert set(plane.kernel.tables) == {"theirs"}
    assert not reconciler.remove(plane.nft, plane.netlink)


def test_without_the_privilege_the_error_names_it(plane: Plane) -> None:
    plane.kernel.permitted = False
    for ask in (reconciler.loaded, reconciler.closed):
        with pytest.raises(KernelError, match="CAP_NET_ADMIN"):
            ask(plane.netlink)
