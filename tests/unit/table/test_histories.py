"""The policy table is compared with a simple model of the policy that may be in force. In any order, stores are
written, backed up, restored and cloned, changes are held and confirmed, agents restart, heads are damaged and
clocks jump."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import closing
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from portward.model import Standing
from portward.store.codec import key_of
from portward.store.confirmation import confirmation
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from portward.table.follower import Follower
from portward.table.history import held_history
from portward.table.invariants import Walk
from portward.table.layout import HEAD, Head
from portward.table.writer import Writer
from unit.store.samples import opened, put
from unit.table.test_table import AZURE, ENFORCE, NOW, attachment, subscription

CUSTOMERS: Final = tuple(range(1, 9))
# With this share, three of eight customers are too many.
SHARE: Final = 0.3
SLOTS: Final = (0, 1, 2)
MEMORY: Final = Path("/dev/shm")  # noqa: S108 # every commit is synced, and a disk takes its time

GOOD, DISABLED, GONE = "good", "disabled", "gone"
_whats: Final = st.sampled_from([GOOD, DISABLED, DISABLED, GONE])
_changes: Final = st.dictionaries(st.sampled_from(CUSTOMERS), _whats, min_size=1, max_size=6)
_hours: Final = st.sampled_from([-20_000, -1, 0, 0, 0, 1, 20_000])
_slots: Final = st.sampled_from(SLOTS)


class Log(NamedTuple):
    """The model of a store: its entries, each with a number that is unique among all stores; the entries that
    confirm a change; and the state of each customer."""

    entries: tuple[int, ...]
    confirming: frozenset[int]
    state: dict[int, str]

    def begins_with(self, entries: tuple[int, ...]) -> bool:
        """Whether the log begins with these entries."""
        return self.entries[: len(entries)] == entries

    def allowed(self) -> set[int]:
        """The customers whose machine may send."""
        return {number for number, what in self.state.items() if what == GOOD}


def changes_of(what: dict[int, str]) -> list[Put]:
    """The changes that bring customers into these states."""
    puts: list[Put] = []
    for number, state in what.items():
        machine = attachment(f"10.0.0.{number}", number)
        standing = Standing.DISABLED if state == DISABLED else Standing.GOOD
        puts.append(put(msgspec.structs.replace(subscription(number), standing=standing)))
        puts.append(Put(key_of(machine), None) if state == GONE else put(machine))
    return puts


class Histories(RuleBasedStateMachine):
    """An agent, its store, and backups of the store that may go their own way."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr("portward.store.flips._FEW", 0)
        where = MEMORY if MEMORY.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="portward-histories-", dir=where))
        self.path = self._folder / "portward.db"
        self._numbers = count(1)
        self.now, self.ahead = NOW, timedelta()
        self.log = Log((), frozenset(), {})
        self.backups: dict[int, Log] = {}
        # The log entries that the policy in force was read from, including early denials behind a held change.
        # None: the history is unknown, so no store has it.
        self.stands: tuple[int, ...] | None = ()
        self.early: tuple[int, ...] = ()
        # While another history is held: its entries when the agent last read it, and the confirmations since then.
        self.seen: tuple[int, ...] = ()
        self.live: set[int] = set()
        # Customers that were denied ahead of a held change.
        self.denied: set[int] = set()
        self.store = opened(self.path)
        self._start()
        self.writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=self.now)
        self._write(self.path, dict.fromkeys(CUSTOMERS, GOOD))
        self._follow()

    def teardown(self) -> None:
        self.writer.close()
        self.store.close()
        self._patch.undo()
        shutil.rmtree(self._folder)

    # --- what happens ---

    @rule(what=_changes, confirm=st.booleans(), hours=_hours, sees=st.booleans())
    def another_tool_writes(self, what: dict[int, str], confirm: bool, hours: int, sees: bool) -> None:
        """Another tool writes, by its own clock. If `sees` is false, the agent does not read it yet."""
        self.ahead = timedelta(hours=hours)
        self._write(self.path, what, confirm=confirm)
        if sees:
            self._follow()

    @rule(number=st.sampled_from(CUSTOMERS))
    def a_customer_is_disabled(self, number: int) -> None:
        """A denial, which is in force at once, whatever is held."""
        self._follow()
        before = self.log
        self._write(self.path, {number: DISABLED})
        self._follow()
        if before.state[number] == GOOD:
            assert number not in self._passing()

    @rule(slot=_slots)
    def it_is_backed_up(self, slot: int) -> None:
        """Makes a backup by SQLite."""
        _copy(self.path, self._slot(slot))
        self.backups[slot] = self.log

    @rule(slot=_slots, confirm=st.booleans())
    def another_store_is_made(self, slot: int, confirm: bool) -> None:
        """Makes another store with the same customers, which may later replace the first."""
        for file in self._folder.glob(f"backup-{slot}.db*"):
            file.unlink()
        opened(self._slot(slot)).close()
        self.backups[slot] = Log((), frozenset(), {})
        self._write_backup(slot, dict.fromkeys(CUSTOMERS, GOOD), confirm=confirm)

    @precondition(lambda self: self.backups)
    @rule(slot=_slots, what=_changes, confirm=st.booleans(), hours=_hours)
    def a_clone_goes_its_own_way(self, slot: int, what: dict[int, str], confirm: bool, hours: int) -> None:
        """A backup is written to, by another clock, perhaps with a confirmation of that change."""
        if slot in self.backups:
            self.ahead = timedelta(hours=hours)
            self._write_backup(slot, what, confirm=confirm)

    @precondition(lambda self: self.backups)
    @rule(slot=_slots, moved=st.booleans(), sees=st.booleans())
    def a_backup_is_restored(self, slot: int, moved: bool, sees: bool) -> None:
        """A backup replaces the store's content in the open file or, if `moved`, the file."""
        if slot not in self.backups:
            return
        if moved:
            self.store.close()
            for file in self._folder.glob("portward.db*"):
                file.unlink()
            _copy(self._slot(slot), self.path)
            self.store = SqliteStore(self.path, agent=True)
            self.follower.reopened(self.store)
        else:
            _copy(self._slot(slot), self.path)
        self.log = self.backups[slot]
        if sees:
            self._follow()

    @precondition(lambda self: 0 in self.backups)
    @rule(what=_changes, hours=_hours, confirm=st.booleans(), ways=st.tuples(st.booleans(), st.booleans()))
    def a_backup_is_restored_and_then_one_that_goes_on_from_it(
        self, what: dict[int, str], hours: int, confirm: bool, ways: tuple[bool, bool]
    ) -> None:
        """Two backups are restored in turn. The second one may contain a confirmation of its own change."""
        _copy(self._slot(0), self._slot(1))
        self.backups[1] = self.backups[0]
        self.a_clone_goes_its_own_way(1, what, confirm, hours)
        for slot, moved in zip((0, 1), ways, strict=True):
            self.a_backup_is_restored(slot, moved, sees=True)

    @rule(what=_changes, number=st.sampled_from(CUSTOMERS), moved=st.booleans())
    def what_is_held_stays_and_what_was_denied_behind_it_is_lost(
        self, what: dict[int, str], number: int, moved: bool
    ) -> None:
        """A backup from between the held change and the denial is restored."""
        self.another_tool_writes(what, confirm=False, hours=0, sees=True)
        self.it_is_backed_up(2)
        self.a_customer_is_disabled(number)
        self.a_backup_is_restored(2, moved, sees=True)

    @rule()
    def it_is_confirmed_here(self) -> None:
        """Confirms like `portward apply --confirm`. Afterwards nothing is held."""
        self._follow()
        self._confirm()
        self._follow()
        assert self.follower.held is None

    @rule()
    def it_is_confirmed_before_the_agent_looks(self) -> None:
        """Confirms before the agent has read the store. This confirms a change held earlier, or nothing."""
        self._confirm()
        self._follow()

    @rule(child=st.booleans())
    def the_agent_looks(self, child: bool) -> None:
        """The agent follows the store, by itself or with a child process."""
        self._follow(child=child)

    @rule(follows=st.booleans())
    def the_agent_starts_again(self, follows: bool) -> None:
        """The agent restarts, as after a stop or a kill."""
        self.writer.close()
        self._start()
        if follows:
            self._follow()

    @rule(hours=_hours)
    def the_clock_jumps(self, hours: int) -> None:
        """The agent's clock jumps."""
        self.now = max(NOW, self.now + timedelta(hours=hours))

    @rule(data=st.sampled_from([b"", b"\x63" * 148]), starts=st.booleans())
    def the_head_is_damaged(self, data: bytes, starts: bool) -> None:
        """The table's head is damaged, while an agent runs or before it starts."""
        with self.writer._environment.begin(write=True) as transaction:
            transaction.put(HEAD, data)
        # A table without entries has nothing that the store could be compared with.
        self.stands = None if self.writer.attachments() else ()
        self.early, self.seen, self.live = (), (), set()
        if starts:
            self.the_agent_starts_again(follows=True)

    # --- what always holds ---

    def _follow(self, *, child: bool = False) -> None:
        """Steps until nothing is left to do, and checks each commit."""
        for _ in range(50):
            if not self._step(child=child):
                break
        else:
            raise AssertionError("it does not come to an end")
        if self.follower.held is None:
            assert self.follower.in_step
            assert self._passing() == self.log.allowed()
        elif self.follower.held.whole:
            self.stands, self.early, self.seen = None, (), self.log.entries
        with self.writer._environment.begin() as transaction:
            assert list(Walk(transaction, self.writer._parts, self.now).findings()) == []

    def _step(self, *, child: bool) -> bool:
        before, noted = self._states(), self.writer.head()
        limit = SHARE * self.writer.reader().counts()[1]
        same = self.stands is not None and self.log.begins_with(self.stands) and self.log.begins_with(self.early)
        if not same and not (self.stands is None and self.log.begins_with(self.seen)):
            self.live.clear()  # they confirmed another state of the store
        if child:
            made = Follower(self.store, self.writer)
            committed = made.step(self.now)
            self.follower.take_over(
                made.waiting,
                refused=made.refused,
                unreadable=made.unreadable.now,
                histories=made.histories,
                in_step=made.in_step,
            )
        else:
            committed = self.follower.step(self.now)
        after, head = self._states(), self._head()
        turned = {number for number, passes in before.items() if after.get(number, False) != passes}
        if same:
            assert self.stands is not None
            taken = self.log.entries[len(self.stands) : head.revision]
            confirmed = not self.log.confirming.isdisjoint(taken)
        else:
            confirmed = not self.live.isdisjoint(self.log.entries)
        opened = {number for number in turned if after.get(number)}
        # A customer that was denied ahead of a held change, and may send again after it, does not count as
        # flipped.
        flipped = turned - opened | opened - self.denied
        assert len(flipped) <= limit or confirmed, f"{flipped} flip, and no one has confirmed it"
        if noted is not None and noted.held and head.held:
            assert not opened, "nothing opens while a change is held"
            self.denied |= turned
        if held_history(head) is None:
            self.stands, self.early = self.log.entries[: head.revision], self.log.entries[: head.ahead]
            self.seen, self.live = (), set()
            if not head.held and not head.ahead:
                self.denied = set()
        return committed is not None

    def _passing(self) -> set[int]:
        return _passing(self._states())

    def _states(self) -> dict[int, bool]:
        """Customer → whether its machine may send, for those with a machine in the table."""
        reader, found = self.writer.reader(), {}
        for number in CUSTOMERS:
            network = attachment(f"10.0.0.{number}", number).address
            holding = reader.holding("vni1", network.network_address)
            if holding is not None:
                found[number] = holding.entry.reason.allows
        return found

    # --- how it is done ---

    def _start(self) -> None:
        self.writer = Writer(self._folder / "table", AZURE, ENFORCE, max_flip_share=SHARE)
        self.follower = Follower(self.store, self.writer)

    def _head(self) -> Head:
        head = self.writer.head()
        assert head is not None
        return head

    def _slot(self, slot: int) -> Path:
        return self._folder / f"backup-{slot}.db"

    def _confirm(self) -> None:
        head = self.writer.head()
        hold = None if head is None else held_history(head)
        number = self._append(self.path, [confirmation(len(self.log.entries) + 1, hold=hold)], self.log)
        self.log = self.log._replace(
            entries=(*self.log.entries, number), confirming=self.log.confirming | {number}
        )
        if hold is not None:
            self.live.add(number)

    def _write(self, path: Path, what: dict[int, str], *, confirm: bool = False) -> None:
        self.log = self._written(path, self.log, what, confirm=confirm)

    def _write_backup(self, slot: int, what: dict[int, str], *, confirm: bool) -> None:
        self.backups[slot] = self._written(self._slot(slot), self.backups[slot], what, confirm=confirm)

    def _written(self, path: Path, log: Log, what: dict[int, str], *, confirm: bool) -> Log:
        changed = {number: state for number, state in what.items() if log.state.get(number) != state}
        if not changed:
            return log
        puts = changes_of(changed)
        if confirm:
            puts.append(confirmation(len(log.entries) + 1))
        number = self._append(path, puts, log)
        confirming = log.confirming | {number} if confirm else log.confirming
        return Log((*log.entries, number), confirming, {**log.state, **changed})

    def _append(self, path: Path, puts: Iterable[Put], log: Log) -> int:
        with closing(SqliteStore(path)) as store:
            revision = len(log.entries)
            assert store.write([*puts], expected=revision, actor="ada", at=self.now + self.ahead) == revision + 1
        return next(self._numbers)


def _passing(states: dict[int, bool]) -> set[int]:
    return {number for number, passes in states.items() if passes}


def _copy(source: Path, target: Path) -> None:
    """Copies a store by SQLite's backup function."""
    with closing(sqlite3.connect(source)) as have, closing(sqlite3.connect(target)) as into:
        have.backup(into)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
