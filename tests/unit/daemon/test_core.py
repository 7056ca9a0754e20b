"""The steps of a gateway on a fake kernel: the state of policy table and kernel after errors of store or
kernel."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import msgspec
import pytest

from portward.config.keys import Config, Verdicts
from portward.daemon import bulk
from portward.daemon import core as module
from portward.daemon.core import Core
from portward.dataplane.desired import NOTHING
from portward.dataplane.fake import FakeKernel
from portward.dataplane.links import Device, Links
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.names import TABLE, VERDICT_SETS
from portward.dataplane.nfnetlink import KernelElements
from portward.dataplane.nft import Nft
from portward.dataplane.rate_limits import Bucket, RateLimits
from portward.dataplane.selfcheck import DifferenceKind
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.errors import KernelError, StoreError
from portward.ipc import mark
from portward.ipc.mark import Class
from portward.model import Attachment, Exemption, ExemptionState, Mode, RateLimit, Record, Subscription
from portward.policy import presets
from portward.store.codec import encode, key_of
from portward.store.flips import UnconfirmedError
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from portward.table.database import TableError
from portward.table.layout import HEAD
from portward.table.writer import Writer

LINKS = Links({3: "vni1", 4: "vni2", 9: "up0"}, frozenset())
MAY, MAY_NOT = UUID(int=1), UUID(int=2)
ALLOWED, DENIED = Source(3, ip_address("10.0.0.4").packed), Source(4, ip_address("10.0.0.4").packed)
DECIDED, STARTED = datetime(2025, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)


def subscription(id_: UUID, offer: str) -> Subscription:
    """A subscription of 2022."""
    return Subscription(id=id_, offer=offer, created=date(2022, 6, 30))


def attachment(segment: str, address: str, id_: UUID) -> Attachment:
    """An attachment that has started long ago."""
    return Attachment(segment=segment, address=ip_network(address), subscription=id_, started=STARTED)


def exemption(id_: UUID, limit: RateLimit | None, until: datetime | None = None) -> Exemption:
    """A granted exemption."""
    return Exemption(
        subscription=id_, state=ExemptionState.GRANTED, requested=DECIDED, decided=DECIDED, by="test",
        justification="mail", reason="a good one", limit=limit, until=until,
    )  # fmt: skip


RECORDS = (
    subscription(MAY, "enterprise-agreement"),
    subscription(MAY_NOT, "pay-as-you-go"),
    attachment("vni1", "10.0.0.0/24", MAY),
    attachment("vni2", "10.0.0.0/24", MAY_NOT),
)


class Ground:
    """A core, its fake kernel and its store."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, bridge: bool = False) -> None:
        """`bridge`: the kernel has tables of family bridge."""
        self.kernel = FakeKernel(bridge=bridge)
        self.folder = folder
        monkeypatch.setattr(module, "NfNetlink", self.kernel.netlink)
        monkeypatch.setattr(module, "Nft", self.kernel.nft)
        self.config = Config(
            segments=("vni*",), uplinks=("up0",), store=f"sqlite:{folder}/portward.db", table=folder / "table"
        )
        SqliteStore(folder / "portward.db", create=True).close()
        self.put(*RECORDS)
        self.elements = KernelElements(self.kernel.netlink())
        self.cache = VerdictCache(self.elements)
        self.core = self.made()

    def made(self) -> Core:
        """A core, not started."""
        return Core(self.config, presets.load("azure-2020"))

    def start(self) -> None:
        """The steps of a start, in their order."""
        self.core.intake.first_policy()
        self.core.first_links(LINKS)
        self.core.load()

    def restart(self) -> None:
        """Replaces the core by one of a new process."""
        self.core.close()
        self.core = self.made()
        self.start()

    def put(self, *records: Record) -> None:
        """Writes into the store."""
        self._write([Put(key_of(record), encode(record)) for record in records])

    def remove(self, *records: Record) -> None:
        """Takes records out of the store."""
        self._write([Put(key_of(record), None) for record in records])

    def _write(self, batch: list[Put]) -> None:
        store = SqliteStore(self.folder / "portward.db")
        store.write(batch, expected=store.revision(), actor="test", at=datetime.now(UTC))
        store.close()

    def another_store(self) -> None:
        """Puts another store with the same records in the place of this one."""
        for file in self.folder.glob("portward.db*"):
            file.unlink()
        SqliteStore(self.folder / "portward.db", create=True).close()
        self.put(*RECORDS)

    def learn(self, *sources: Source) -> None:
        """The kernel caches that these sources may send, or may not, as the policy table says."""
        for source in sources:
            verdict = Class.ALLOW if source.link == 3 else Class.DENY
            self.kernel.learn(VERDICT_SETS[verdict] + source.family, source.key)

    def cached(self) -> dict[Source, Class]:
        """Every cached verdict."""
        return {
            Source.of(key): verdict
            for verdict, name in VERDICT_SETS.items()
            for family in "46"
            for key in self.kernel.tables[TABLE].sets[name + family].elements
        }

    def in_step(self) -> bool:
        """Whether all cached verdicts agree with the policy table."""
        core = self.core
        return self.cache.epoch() == mark.epoch_of(core.generation) and self.cache.synced() == core.generation


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    """A gateway that is not started."""
    found = Ground(tmp_path, monkeypatch)
    yield found
    found.core.close()


@pytest.fixture
def started(ground: Ground) -> Ground:
    """A gateway that enforces, with two cached verdicts."""
    ground.start()
    ground.learn(ALLOWED, DENIED)
    return ground


# --- the start ---


def test_a_start_writes_the_kernel_in_its_last_step_only(ground: Ground) -> None:
    ground.core.intake.first_policy()
    ground.core.first_links(LINKS)
    assert not ground.kernel.journal
    ground.core.load()
    assert ground.in_step()
    assert (ground.core.dataplane.enforced, ground.core.revision, ground.core.dataplane.broken) == (1, 1, "")
    assert ground.core.intake.segments() == {3: "vni1", 4: "vni2"}
    assert ground.core.at_rest()


def test_without_store_and_table_there_is_nothing_to_enforce(ground: Ground) -> None:
    (ground.folder / "portward.db").unlink()
    with pytest.raises(StoreError):
        ground.core.intake.first_policy()
    assert not ground.kernel.journal


def test_a_table_of_another_version_is_named_if_the_store_cannot_be_read(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable store alone does not end the agent, so the message must say why the table cannot be used."""
    (ground.folder / "portward.db").unlink()
    monkeypatch.setattr(Writer, "of_other_format", True)
    with pytest.raises(StoreError, match=r"was written by another version of portward.*and that failed: "):
        ground.core.intake.first_policy()


def test_a_table_of_an_earlier_run_serves_without_a_store(started: Ground) -> None:
    (started.folder / "portward.db").unlink()
    started.restart()
    assert started.core.revision == 1
    assert set(started.cached()) == {ALLOWED, DENIED}, "what the kernel has cached agrees with it"
    assert started.in_step()


@pytest.mark.parametrize("permitted", [True, False])
def test_who_may_not_write_rules_is_told_before_anything_else(ground: Ground, permitted: bool) -> None:
    ground.core.close()
    ground.kernel.permitted = permitted
    if permitted:
        ground.core = ground.made()
    else:
        with pytest.raises(KernelError, match=r"root or CAP_NET_ADMIN\?"):
            ground.made()
        ground.kernel.permitted = True
        ground.core = ground.made()


def test_a_kernel_without_nft_queue_gets_the_target_of_xtables(ground: Ground) -> None:
    ground.core.close()
    ground.kernel.native = False
    ground.core = ground.made()
    ground.start()
    assert not ground.core.native
    assert ground.in_step()
    assert ground.core.at_rest()


def test_a_kernel_without_any_way_to_a_queue_is_refused_before_anything_is_written(ground: Ground) -> None:
    ground.kernel.native = ground.kernel.xtables = False
    with pytest.raises(KernelError, match="no way to a queue"):
        ground.made()
    assert not ground.kernel.journal


def test_the_kernels_notices_are_heard_if_no_write_of_libnftables_is_among_them(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their socket is closed with the core."""
    done: list[str] = []

    class Hearing:
        def read(self) -> RulesetChanges:
            done.append("read")
            return RulesetChanges()

        def close(self) -> None:
            done.append("closed")

    monkeypatch.setattr(module, "hearing", lambda *_: Hearing())
    monkeypatch.setattr(Nft, "compiles", True)
    ground.core.close()
    ground.core = ground.made()
    ground.start()
    ground.core.dataplane.check()
    assert "read" in done
    assert "closed" not in done
    ground.core.close()
    assert done.count("closed") == 1


def test_a_kernel_that_refuses_the_ruleset_ends_the_start(ground: Ground) -> None:
    ground.core.intake.first_policy()
    ground.core.first_links(LINKS)
    ground.kernel.refuse(errno.ENOMEM)
    with pytest.raises(KernelError, match="Cannot allocate memory"):
        ground.core.load()
    assert not ground.kernel.tables


def test_a_start_on_a_table_with_a_damaged_head_holds_a_mistake_in_the_store(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts with the readable policy, and holds a change that would flip too many subscriptions."""
    monkeypatch.setattr("portward.store.flips._FEW", 0)
    ground.start()
    ground.learn(ALLOWED)
    with ground.core._writer._environment.begin(write=True) as transaction:
        transaction.put(HEAD, b"")
    ground.core.intake.close()
    ground.remove(RECORDS[2])
    ground.restart()
    while ground.core.intake.sync():
        pass
    held = ground.core.intake.held
    assert held is not None
    assert (held.revision, held.flips.flipped) == (2, 1)
    finding = ground.core._writer.reader().lookup(ALLOWED.link, ALLOWED.address)
    assert finding is not None
    assert finding.reason.allows
    assert ground.in_step()


def test_a_grant_that_ended_while_no_agent_ran_ends_with_the_start(ground: Ground) -> None:
    until = datetime.now(UTC) + timedelta(hours=1)
    ground.put(exemption(MAY_NOT, None, until=until))
    ground.start()
    ground.kernel.learn("allow4", DENIED.key)
    ground.core.close()
    ground.core = ground.made()
    ground.core.clock.now = lambda: until + timedelta(seconds=1)  # type: ignore[method-assign]
    ground.start()
    assert not ground.cached()
    assert ground.in_step()


# --- changes of the store ---


def test_a_change_of_policy_forgets_what_it_reaches(started: Ground) -> None:
    started.put(subscription(MAY, "pay-as-you-go"))
    assert started.core.intake.sync()
    assert set(started.cached()) == {DENIED}
    assert started.in_step()
    assert (started.core.dataplane.enforced, started.core.revision) == (2, 2)
    assert not started.core.intake.sync(), "there is nothing more"


def test_a_change_without_another_verdict_leaves_the_kernel_alone(started: Ground) -> None:
    written = len(started.kernel.journal)
    started.put(msgspec.structs.replace(RECORDS[0], name="another name"))
    assert started.core.intake.sync()
    assert len(started.kernel.journal) == written
    assert started.core.dataplane.enforced == 2


def test_a_removed_subscription_sends_no_more(started: Ground) -> None:
    started.remove(RECORDS[2], RECORDS[0])
    started.core.intake.sync()
    assert set(started.cached()) == {DENIED}
    assert started.in_step()


@pytest.mark.parametrize("damage", ["missing", "no database"])
def test_a_store_that_cannot_be_read_leaves_the_last_policy_in_force(started: Ground, damage: str) -> None:
    path = started.folder / "portward.db"
    text = path.read_bytes()
    path.unlink()
    if damage == "no database":
        path.write_text("this is no database" * 100)
    started.core.intake.close()
    for _ in range(3):
        assert not started.core.intake.sync()
    assert (started.core.intake.store_errors, bool(started.core.intake.store_error)) == (3, True)
    assert set(started.cached()) == {ALLOWED, DENIED}
    path.write_bytes(text)
    started.core.intake.sync()
    assert started.core.intake.store_error == ""


@pytest.mark.parametrize("step", range(3))
def test_a_kernel_that_refuses_a_change_is_repaired(started: Ground, step: int) -> None:
    started.put(subscription(MAY, "pay-as-you-go"))
    started.kernel.refuse(errno.ENOMEM, after=step)
    started.core.intake.sync()
    assert ALLOWED not in started.cached()
    assert started.in_step()
    assert (started.core.dataplane.broken, started.core.dataplane.enforced) == ("", 2)
    assert started.core.at_rest()


def test_while_the_kernel_refuses_everything_it_is_said_and_tried_again(started: Ground) -> None:
    started.put(subscription(MAY, "pay-as-you-go"))
    started.kernel.refuse(errno.ENOMEM, times=6)
    started.core.intake.sync()
    assert "Cannot allocate memory" in started.core.dataplane.broken
    assert not started.core.at_rest()
    for _ in range(10):
        started.core.dataplane.check()
    assert started.core.dataplane.broken == ""
    assert ALLOWED not in started.cached()
    assert started.in_step()


# --- time, links, surroundings ---


def test_a_grant_that_ends_is_enforced(started: Ground) -> None:
    until = datetime.now(UTC) + timedelta(hours=1)
    started.put(exemption(MAY_NOT, None, until=until))
    started.core.intake.sync()
    assert DENIED not in started.cached()
    started.kernel.learn("allow4", DENIED.key)
    due = started.core.next_expiry()
    assert due is not None
    assert abs(due - until) < timedelta(seconds=1)
    started.core.clock.now = lambda: until + timedelta(seconds=1)  # type: ignore[method-assign]
    started.core.intake.decide_due()
    assert set(started.cached()) == {ALLOWED}
    assert started.in_step()
    assert started.core.next_expiry() is None


@pytest.mark.parametrize(
    ("links", "left"),
    [
        (Links({3: "vni1", 9: "up0"}, frozenset({4})), {ALLOWED}),
        (Links({3: "vni2", 4: "vni1", 9: "up0"}, frozenset({3, 4})), set()),
        (Links({3: "vni1", 4: "vni2", 9: "up0"}, frozenset({3})), {DENIED}),
        (Links({3: "vni1", 4: "vni2", 5: "vni7", 9: "up0"}, frozenset()), {ALLOWED, DENIED}),
        (Links({3: "eth7", 4: "vni2", 9: "up0"}, frozenset({3})), {DENIED}),
    ],
    ids=["gone", "exchanged", "same name again", "one more", "renamed"],
)
def test_interfaces_that_change_take_their_cached_verdicts_with_them(
    started: Ground, links: Links, left: set[Source]
) -> None:
    started.core.intake.links_changed(links)
    assert set(started.cached()) == left
    assert started.in_step()


def test_a_fault_while_interfaces_change_drops_none_of_them_for_ever(
    started: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = started.core
    core.dataplane.unsettle(frozenset({4}), 1)
    with monkeypatch.context() as patch:

        def fails(*_: object) -> None:
            raise MemoryError

        patch.setattr(VerdictCache, "move_epoch", fails)
        core.intake.links_changed(Links({3: "vni1", 4: "vni3", 9: "up0"}, frozenset({4})), 1)
    assert core.dataplane.broken == "MemoryError: "
    assert unsettled(started) == {4}, "until everything older is forgotten"
    core.dataplane.check()
    assert not core.dataplane.broken
    assert unsettled(started) == set()
    assert started.in_step()


def unsettled(ground: Ground) -> set[int]:
    """The interfaces whose packets are dropped, because the policy table still has their previous owners."""
    return {int.from_bytes(row[0], sys.byteorder) for row in ground.kernel.netlink().rows(TABLE, "unsettled")}


def test_other_surroundings_load_the_ruleset_and_keep_what_is_cached(started: Ground) -> None:
    written = len(started.kernel.journal)
    started.core.dataplane.surround(NOTHING)
    assert len(started.kernel.journal) == written, "they are the same"
    started.core.dataplane.surround(NOTHING._replace(tunnel_ports=frozenset({4789})))
    assert len(started.kernel.journal) > written
    assert set(started.cached()) == {ALLOWED, DENIED}
    assert started.core.at_rest()


def test_surroundings_that_the_kernel_refuses_are_tried_again(started: Ground) -> None:
    started.kernel.refuse(errno.ENOMEM, times=2)
    started.core.dataplane.surround(NOTHING._replace(tunnel_ports=frozenset({4789})))
    assert started.core.dataplane.broken
    started.core.dataplane.check()
    assert started.core.dataplane.broken == ""


TRANSLATING = "table inet theirs {\n chain dnat { type nat hook prerouting priority dstnat; policy accept; }\n}\n"
BRIDGED = LINKS._replace(devices=(Device(3, "vni1", master=8), Device(8, "br0", "bridge")))
BESIDE = {"guard", "stacked"}


def beside(ground: Ground) -> set[str]:
    """The loaded chains that only some surroundings need."""
    return (
        BESIDE
        & ground.kernel.tables[TABLE].chains.keys()
        & {name for name, chain in ground.kernel.tables[TABLE].chains.items() if chain.base is not None}
    )


def test_what_stands_around_at_the_start_is_in_the_first_load(ground: Ground) -> None:
    ground.kernel.load(TRANSLATING)
    ground.core.intake.first_policy()
    ground.core.first_links(BRIDGED)
    ground.kernel.journal.clear()
    ground.core.load()
    first = str(ground.kernel.journal[0].done)
    assert all(f"  chain {name} {{" in first for name in BESIDE)
    assert ground.core.at_rest()


def test_a_change_of_one_part_of_the_surroundings_leaves_the_others(started: Ground) -> None:
    core = started.core
    core.dataplane.links_seen(BRIDGED)
    assert beside(started) == {"stacked"}
    started.kernel.load(TRANSLATING)
    assert not core.at_rest()
    core.dataplane.check()
    assert beside(started) == BESIDE
    core.dataplane.links_seen(LINKS)
    assert beside(started) == {"guard"}
    core.dataplane.links_seen(BRIDGED)
    started.kernel.load("delete table inet theirs")
    core.dataplane.check()
    assert beside(started) == {"stacked"}
    assert set(started.cached()) == {ALLOWED, DENIED}
    assert core.dataplane.inet.reconciler.repairs == 0


def known(ground: Ground) -> set[int]:
    """The indexes of the interfaces from which mail is let through."""
    elements = ground.kernel.tables[TABLE].sets["known_interfaces"].elements
    return {int.from_bytes(key[:4], "little") for key in elements}


def test_an_interface_that_comes_or_goes_is_written_alone(started: Ground) -> None:
    """The whole ruleset is not loaded, because a host may start a thousand containers."""
    one, two = (LINKS._replace(devices=(Device(7, "one"), *more)) for more in ((), (Device(9, "two"),)))
    started.core.dataplane.links_seen(two)
    assert known(started) == {7, 9}
    started.kernel.journal.clear()
    started.core.dataplane.links_seen(one)
    assert known(started) == {7}
    (step,) = started.kernel.journal
    assert "known_interfaces" in str(step.done)
    assert started.core.at_rest()


def test_a_load_writes_the_known_interfaces_again(started: Ground) -> None:
    started.core.dataplane.links_seen(LINKS._replace(devices=(Device(7, "one"),)))
    started.kernel.load("flush ruleset")
    started.core.dataplane.check()
    assert known(started) == {7}


def test_known_interfaces_that_another_program_has_removed_are_put_back(started: Ground) -> None:
    started.core.dataplane.links_seen(LINKS._replace(devices=(Device(7, "one"), Device(9, "two"))))
    started.kernel.load("flush set inet portward known_interfaces")
    started.core.dataplane.links_seen(LINKS._replace(devices=(Device(7, "one"),)))
    assert known(started) == {7}
    assert started.core.dataplane.broken == ""


@pytest.mark.parametrize(
    "change", ["flush set inet portward known_interfaces", "add element inet portward known_interfaces { 11 }"]
)
def test_known_interfaces_that_another_program_has_changed_are_put_back_though_no_interface_changes(
    started: Ground, change: str
) -> None:
    """Otherwise mail from all other interfaces would be dropped until an interface is added or removed."""
    started.core.dataplane.links_seen(LINKS._replace(devices=(Device(7, "one"), Device(9, "two"))))
    started.learn(ALLOWED)
    started.kernel.load(change)
    assert not started.core.at_rest()
    started.core.dataplane.check()
    assert known(started) == {7, 9}
    assert started.core.at_rest()
    assert ALLOWED in started.cached(), "nothing else was touched"


def test_a_bridge_that_loses_its_ports_is_unknown_before_its_chain_is_gone(started: Ground) -> None:
    """Otherwise its packets pass if a segment becomes its port again in between."""
    bridge = next(device for device in BRIDGED.devices if device.kind == "bridge")
    started.core.dataplane.links_seen(BRIDGED)
    assert bridge.ifindex in known(started)
    started.kernel.history.clear()
    started.core.dataplane.links_seen(
        LINKS._replace(devices=tuple(one._replace(master=0) for one in BRIDGED.devices))
    )
    assert beside(started) == set()
    key = bridge.ifindex.to_bytes(4, "little")
    for tables in started.kernel.history:
        table = tables[TABLE]
        assert "stacked" in table.chains or key not in table.sets["known_interfaces"].elements


def test_known_interfaces_stay_known_while_the_ruleset_is_loaded(started: Ground) -> None:
    started.core.dataplane.links_seen(LINKS._replace(devices=(Device(7, "one"),)))
    started.kernel.history.clear()
    started.core.dataplane.links_seen(LINKS._replace(devices=(Device(7, "one"), *BRIDGED.devices)))
    assert started.kernel.history
    for tables in started.kernel.history:
        assert (7).to_bytes(4, "little") in tables[TABLE].sets["known_interfaces"].elements


def test_a_ruleset_that_was_taken_is_put_back_and_counted_also_if_the_surroundings_change(started: Ground) -> None:
    started.kernel.load("flush ruleset")
    started.core.dataplane.links_seen(BRIDGED)
    assert beside(started) == {"stacked"}
    assert started.core.dataplane.inet.reconciler.repairs == 1
    assert started.core.selfcheck.divergences[DifferenceKind.RULESET] == 1


def test_the_guards_question_is_answered_unless_the_interface_is_unsettled(started: Ground) -> None:
    """The table would return the verdict of the interface that had this index before."""
    started.kernel.load(TRANSLATING)
    started.core.dataplane.check()
    assert started.core.dataplane.guarded
    started.core.dataplane.unsettle(frozenset({3}), 7)
    started.core.dataplane.install_limits([ALLOWED, DENIED])
    assert set(started.cached()) == {DENIED}
    started.core.intake.links_changed(LINKS, 7)
    started.core.dataplane.install_limits([ALLOWED])
    assert started.cached() == {ALLOWED: Class.ALLOW, DENIED: Class.DENY}


# --- the ruleset ---


@pytest.mark.parametrize("text", ["flush ruleset", "flush chain inet portward screen"])
def test_a_ruleset_that_another_program_changed_is_put_back_and_counted(started: Ground, text: str) -> None:
    started.kernel.load(text)
    assert not started.core.at_rest()
    started.core.dataplane.check()
    assert started.kernel.tables[TABLE].chains["screen"].rules
    assert started.core.dataplane.inet.reconciler.repairs == 1
    assert started.core.selfcheck.divergences[DifferenceKind.RULESET] == 1
    assert not started.cached(), "the sets may have been changed too"
    started.core.dataplane.check()
    assert started.core.dataplane.inet.reconciler.repairs == 1


# --- self-check of cached verdicts ---


def test_a_cached_verdict_that_is_not_the_tables_is_found_and_forgotten(started: Ground) -> None:
    started.kernel.learn("allow4", DENIED.key)
    started.core.count(1.0)
    suspects = started.core.counting.suspects()
    assert suspects == [DENIED]
    started.core.dataplane.correct(suspects)
    assert set(started.cached()) == {ALLOWED}
    assert started.core.selfcheck.divergences[DifferenceKind.CACHED] == 1
    started.core.count(1.0)
    assert started.core.counting.suspects() == []


def test_a_suspect_that_is_right_by_now_is_left_alone(started: Ground) -> None:
    written = len(started.kernel.journal)
    started.core.dataplane.correct([ALLOWED, DENIED, Source(3, ip_address("10.0.0.9").packed)])
    assert len(started.kernel.journal) == written


def test_without_a_ruleset_nothing_is_counted(started: Ground) -> None:
    started.kernel.load("flush ruleset")
    started.core.count(1.0)
    assert started.core.limited() == {}
    assert started.core.counting.screen() == {}


# --- rate limits ---


@pytest.fixture
def limited(started: Ground) -> Ground:
    """The second subscription may send ten a minute."""
    started.put(exemption(MAY_NOT, RateLimit(per_minute=10, burst=2)))
    started.core.intake.sync()
    return started


def rates(ground: Ground) -> dict[Source, tuple[int, int]]:
    """Source → limit, in the kernel."""
    return {source: bucket[1:] for source, bucket in RateLimits.sources_in_kernel(ground.elements).items()}


def test_a_source_that_a_worker_met_gets_the_limit_of_its_subscription(limited: Ground) -> None:
    limited.core.dataplane.install_limits([DENIED, ALLOWED, Source(9, DENIED.address)])
    assert rates(limited) == {DENIED: (10, 2)}


def test_a_refused_limit_is_written_when_the_source_sends_again(limited: Ground) -> None:
    limited.kernel.refuse(errno.ENOMEM)
    limited.core.dataplane.install_limits([DENIED])
    assert rates(limited) == {}
    limited.core.dataplane.install_limits([DENIED])
    assert rates(limited) == {DENIED: (10, 2)}


def test_another_limit_takes_the_place_of_the_first_and_an_end_takes_it_away(limited: Ground) -> None:
    limited.core.dataplane.install_limits([DENIED])
    limited.put(exemption(MAY_NOT, RateLimit(per_minute=20, burst=2)))
    limited.core.intake.sync()
    assert rates(limited) == {DENIED: (20, 2)}
    limited.remove(exemption(MAY_NOT, None))
    limited.core.intake.sync()
    assert rates(limited) == {}
    limited.core.dataplane.sync_rate_limits()
    assert limited.elements.limits() == [], "and the limits that are not in force go"


def test_a_limit_that_is_not_the_tables_is_found_and_forgotten(limited: Ground) -> None:
    limited.core.dataplane.install_limits([DENIED])
    limited.kernel.load("flush map inet portward rates4")
    wrong = Bucket(99, 1, 1)
    RateLimits(limited.elements).add({ALLOWED: wrong})
    limited.core.count(1.0)
    limited.core.dataplane.sync_rate_limits()
    assert rates(limited) == {}
    assert limited.core.selfcheck.divergences[DifferenceKind.CACHED] == 1


# --- another configuration ---


def test_another_preset_is_enforced(started: Ground) -> None:
    started.core.intake.reload(started.config, presets.load("aws"))
    assert started.core.dataplane.preset.name == "aws"
    assert ALLOWED not in started.cached()
    assert started.in_step()


REFUSED: dict[str, Callable[[Ground], tuple[Config, type[Exception]]]] = {
    "by the kernel": lambda ground: (ground.config, KernelError),
    "since too many would flip": lambda ground: (
        msgspec.structs.replace(ground.config, max_flip_share=0.01),
        UnconfirmedError,
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_configuration_that_is_refused_changes_nothing(
    started: Ground, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr("portward.store.flips._FEW", 0)  # so few are never held
    config, error = REFUSED[why](started)
    if error is KernelError:

        def broken(_: object) -> None:
            raise KernelError("the kernel does not take it")

        monkeypatch.setattr(started.core.dataplane.inet.reconciler, "check", broken)
    before, generation = started.kernel.state(), started.core.generation
    with pytest.raises(error):
        started.core.intake.reload(config, presets.load("aws"))
    assert started.core.dataplane.preset.name == "azure-2020"
    assert (started.core.dataplane.config, started.core.generation) == (started.config, generation)
    assert started.kernel.state() == before


def test_observed_segments_are_enforced_after_a_reload(started: Ground) -> None:
    config = msgspec.structs.replace(started.config, mode=Mode.OBSERVE)
    started.core.intake.reload(config, presets.load("azure-2020"))
    assert DENIED not in started.cached()
    assert started.in_step()
    config = msgspec.structs.replace(started.config, verdicts=Verdicts(observe=("vni2",)))
    started.core.intake.reload(config, presets.load("azure-2020"))
    assert started.in_step()


@pytest.mark.parametrize("step", range(4))
def test_a_reload_that_the_kernel_refuses_half_way_is_in_force_in_the_end(started: Ground, step: int) -> None:
    started.kernel.refuse(errno.ENOMEM, after=step)
    started.core.intake.reload(started.config, presets.load("aws"))
    for _ in range(3):
        started.core.dataplane.check()
    assert started.core.dataplane.preset.name == "aws"
    assert started.core.dataplane.broken == ""
    assert ALLOWED not in started.cached()
    assert started.in_step()


# --- what a child process does ---


def small(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the core give more than one change to a child, after a restart."""
    monkeypatch.setattr("portward.daemon.intake.MAX_INLINE_CHANGES", 1)
    ground.restart()


def killed_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes each child be killed after its work, before its result was read."""
    told = bulk._result_of

    def cut_off(process: subprocess.Popen[bytes], outcomes: BinaryIO, job: bulk.Job) -> bulk.BulkResult:
        told(process, outcomes, job)
        raise EOFError

    monkeypatch.setattr(bulk, "_result_of", cut_off)


def killed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes each child be killed before its work."""
    code = "import os, sys; sys.stdin.buffer.read(1); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(bulk, "PYTHON", (sys.executable, "-I", "-c", code, "--"))


def decided_by(ground: Ground) -> str:
    """The digest of the preset that the table was decided under."""
    head = ground.core._writer.head()
    assert head is not None
    return head.preset.hex()


def test_a_reload_whose_child_is_killed_after_its_commit_is_in_force(
    started: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is decided under the other preset. With the old one the agent would enforce one and report the
    other."""
    small(started, monkeypatch)
    killed_late(monkeypatch)
    started.core.intake.reload(started.config, presets.load("aws"))
    assert (started.core.dataplane.preset.name, decided_by(started)) == ("aws", presets.load("aws").digest)
    assert not started.core._writer.is_decided_otherwise()
    assert ALLOWED not in started.cached()
    assert started.in_step()


def test_answers_whose_child_is_killed_after_its_commit_are_in_force(
    started: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(started, monkeypatch)
    killed_late(monkeypatch)
    config = msgspec.structs.replace(started.config, mode=Mode.OBSERVE)
    started.core.intake.reload(config, presets.load("azure-2020"))
    assert started.core.dataplane.config.mode is Mode.OBSERVE
    assert not started.core._writer.is_decided_otherwise()
    assert DENIED not in started.cached()
    assert started.in_step()


def test_a_reload_whose_child_is_killed_before_its_commit_changes_nothing(
    started: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(started, monkeypatch)
    before, generation = started.kernel.state(), started.core.generation
    with monkeypatch.context() as once:
        killed_early(once)
        with pytest.raises(TableError, match="the process of a bulk change ended"):
            started.core.intake.reload(started.config, presets.load("aws"))
    assert (started.core.dataplane.preset.name, decided_by(started)) == (
        "azure-2020",
        presets.load("azure-2020").digest,
    )
    assert (started.core.generation, started.kernel.state()) == (generation, before)
    started.core.intake.reload(started.config, presets.load("aws"))
    assert (started.core.dataplane.preset.name, decided_by(started)) == ("aws", presets.load("aws").digest)


def test_a_bulk_change_whose_child_is_killed_after_its_commit_is_enforced(
    started: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(started, monkeypatch)
    killed_late(monkeypatch)
    started.remove(RECORDS[2])
    started.put(attachment("vni2", "10.0.5.4", MAY), attachment("vni2", "10.0.6.4", MAY))
    assert started.core.intake.sync()
    assert (started.core.dataplane.enforced, started.core.intake.store_error) == (3, "")
    assert ALLOWED not in started.cached()
    assert started.in_step()
    assert not started.core.intake.sync(), "nothing is left to be done"
    assert started.core.intake.in_step


def test_a_bulk_change_whose_child_is_killed_before_its_commit_is_made_again(
    started: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(started, monkeypatch)
    started.put(attachment("vni2", "10.0.5.4", MAY), attachment("vni2", "10.0.6.4", MAY))
    with monkeypatch.context() as once:
        killed_early(once)
        assert not started.core.intake.sync()
        assert "the process of a bulk change ended" in started.core.intake.store_error
        assert started.core.revision == 1
    assert started.core.intake.sync()
    assert (started.core.dataplane.enforced, started.core.intake.store_error) == (2, "")


def truncates(path: Path) -> bool:
    """Whether SQLite can empty the write-ahead log of a store now, because no process reads an older state of
    it."""
    with closing(sqlite3.connect(path, timeout=0)) as connection:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


SNAPSHOTS: dict[str, Callable[[Ground], None]] = {
    "first load": lambda ground: shutil.rmtree(ground.config.table),
    "changes": lambda ground: None,
    "another history": lambda ground: ground.another_store(),
}


@pytest.mark.parametrize("case", SNAPSHOTS)
def test_no_snapshot_of_the_store_is_kept_while_a_child_reads_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """SQLite's write-ahead log would grow during a bulk change and slow down every reading: the store was
    half-read when the limit was reached."""
    monkeypatch.setattr("portward.daemon.intake.MAX_INLINE_CHANGES", 2)
    ground.start()
    ground.put(*(attachment("vni2", f"10.0.{number}.4", MAY) for number in range(5, 10)))
    ground.core.intake.close()
    ground.core.close()
    SNAPSHOTS[case](ground)
    ground.core = ground.made()
    found: list[bool] = []
    run = bulk.Bulk.run

    def looked(self: bulk.Bulk, job: bulk.Job) -> bulk.BulkResult:
        path = ground.folder / "portward.db"
        ground.put(attachment("vni2", f"10.1.{len(found)}.4", MAY))
        with closing(sqlite3.connect(path)) as other:
            half_way = other.execute("SELECT 1 FROM change")
            assert half_way.fetchone()
            assert not truncates(path), "a reader that stops half-way keeps it"
            half_way.close()
        found.append(truncates(path))
        return run(self, job)

    monkeypatch.setattr(bulk.Bulk, "run", looked)
    ground.start()
    ground.core.intake.sync()
    assert found == [True]


class Later:
    """A kernel thread that works only when the test lets it."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def __call__(self, work: Callable[[], object]) -> Future[Any]:
        self.work.append(work)
        return Future()

    def catch_up(self) -> None:
        """Runs all waiting work."""
        while self.work:
            self.work.pop(0)()


@pytest.fixture
def late(started: Ground) -> tuple[Ground, Later]:
    """A core whose changes wait for the kernel thread."""
    later = Later()
    started.core.intake._on_kernel = later
    return started, later


def test_changes_that_wait_for_the_kernel_thread_are_carried_out_together(late: tuple[Ground, Later]) -> None:
    """So neither a revocation nor a repair waits behind many changes."""
    ground, later = late
    before = len(ground.kernel.journal)
    for name in range(20):
        ground.put(attachment("vni2", f"10.0.{name + 1}.4", MAY))
        assert ground.core.intake.sync()
    ground.remove(RECORDS[2])
    assert ground.core.intake.sync()
    later.catch_up()
    assert ground.in_step()
    assert ground.core.dataplane.enforced == ground.core.revision
    assert set(ground.cached()) == {DENIED}
    assert len(ground.kernel.journal) - before < 10


def test_a_fault_in_carrying_one_change_out_is_not_forgotten_by_the_next(
    late: tuple[Ground, Later], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first change revokes a source; the second one is of another. The first fails on the kernel thread."""
    ground, later = late
    ground.remove(RECORDS[2])
    assert ground.core.intake.sync()
    with monkeypatch.context() as patched:
        patched.setattr(VerdictCache, "forget_within", _no_memory)
        later.catch_up()
    assert not ground.in_step()
    ground.put(attachment("vni2", "10.0.9.4", MAY))
    assert ground.core.intake.sync()
    later.catch_up()
    assert ground.in_step()
    assert ALLOWED not in ground.cached()
    assert ground.core.dataplane.enforced == ground.core.revision


def _no_memory(*_: object, **__: object) -> None:
    raise MemoryError


# --- a table that cannot be written ---


def _no_room(*_: object, **__: object) -> None:
    raise TableError("no room")


def test_interfaces_that_cannot_be_written_are_retried_with_all_that_changed_meanwhile(
    started: Ground, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged once. In the end the cached verdicts behind each interface are forgotten."""
    core = started.core
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "put_links", _no_room)
        for index in (3, 4):
            assert not core.intake.links_changed(LINKS._replace(touched=frozenset({index})))
            assert core.intake.links_failed
    assert caplog.text.count("the table lacks new interfaces") == 1
    assert set(started.cached()) == {ALLOWED, DENIED}
    core.intake.retry_links()
    assert not core.intake.links_failed
    assert started.cached() == {}
    assert started.in_step()
    written = len(started.kernel.journal)
    core.intake.retry_links()
    assert len(started.kernel.journal) == written, "there is nothing to retry"


def test_a_grant_whose_end_cannot_be_written_is_an_error_and_ends_with_the_next_try(
    started: Ground, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    until = datetime.now(UTC) + timedelta(hours=1)
    started.put(exemption(MAY_NOT, None, until=until))
    started.core.intake.sync()
    started.kernel.learn("allow4", DENIED.key)
    started.core.clock.now = lambda: until + timedelta(seconds=1)  # type: ignore[method-assign]
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "decide_due", _no_room)
        started.core.intake.decide_due()
    assert started.core.intake.store_errors == 1
    assert "a grant has ended and still counts" in caplog.text
    started.core.intake.decide_due()
    assert set(started.cached()) == {ALLOWED}


def test_a_reload_whose_interfaces_cannot_be_written_is_in_force_and_they_are_retried(
    started: Ground, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The table has new decisions already, so the kernel must get them."""
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "put_links", _no_room)
        started.core.intake.reload(started.config, presets.load("aws"))
    assert started.core.dataplane.preset.name == "aws"
    assert ALLOWED not in started.cached()
    assert "in force in part, and is tried again: no room" in caplog.text
    assert started.core.intake.links_failed
    started.core.intake.retry_links()
    assert not started.core.intake.links_failed
    assert started.in_step()
