"""Exemptions in an SQLite store, compared with a model. People may act in any order and two at once, and the
process may die in between. No accepted decision is lost or made twice.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from portward.exemptions import lifecycle
from portward.exemptions.lifecycle import Action, Application, FraudResult, RefusedError
from portward.exemptions.service import ExemptionService
from portward.model import Exemption, ExemptionState, FraudCheck, RateLimit, Subscription
from portward.policy import presets
from portward.store.codec import decode, encode, key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put

_PRESET: Final = presets.load("azure-2020")
_OFFERS: Final = {1: "pay-as-you-go", 2: "azure-sponsorship", 3: "free-trial", 4: "enterprise-agreement"}
_REFUSED, _CRASHED = 3, 9
_START: Final = datetime(2026, 6, 1, tzinfo=UTC)
_DAYS: Final = st.none() | st.integers(1, 5)
_ids = st.sampled_from([UUID(int=number) for number in _OFFERS])
_actions = st.sampled_from(Action)


class Late(SqliteStore):
    """A store to which another process writes just before each write."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.before: list[Callable[[], None]] = []

    def write(self, *arguments: Any, **options: Any) -> int:
        """Writes, after what comes before."""
        if self.before:
            self.before.pop()()
        return super().write(*arguments, **options)


class Exempt(RuleBasedStateMachine):
    """`known` is the state that the store must have: for each subscription, its exemption and its number of
    decisions."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="portward-life-")
        self._path = Path(self._folder.name) / "portward.db"
        self.now = _START
        with closing(SqliteStore(self._path, create=True)) as store:
            records = [
                Subscription(id=UUID(int=number), offer=offer, created=date(2022, 6, 30), payment_history=True)
                for number, offer in _OFFERS.items()
            ]
            store.write(
                [Put(key_of(record), encode(record)) for record in records], expected=0, actor="model", at=self.now
            )
        self.now += timedelta(seconds=1)
        self.known: dict[UUID, Exemption | None] = {UUID(int=number): None for number in _OFFERS}
        self.decisions: dict[UUID, int] = dict.fromkeys(self.known, 0)

    def teardown(self) -> None:
        self._folder.cleanup()

    # --- what happens ---

    @rule(days=st.integers(0, 3))
    def time_passes(self, days: int) -> None:
        """Moves the clock, so that grants end."""
        self.now += timedelta(days=days, seconds=1)

    @rule(id_=_ids, action=_actions, days=_DAYS)
    def a_person_acts(self, id_: UUID, action: Action, days: int | None) -> None:
        """A person acts. The action is done or refused as the model says."""
        with closing(SqliteStore(self._path)) as store:
            self._tries(store, id_, action, days)

    @rule(id_=_ids, action=_actions, days=_DAYS, statement=st.integers(1, 14))
    def a_person_acts_and_the_process_dies(
        self, id_: UUID, action: Action, days: int | None, statement: int
    ) -> None:
        """A person acts, and the process dies at the SQL statement with that number, if it gets that far."""
        code = _in_a_process(lambda: self._act_and_die(id_, action, days, statement))
        expected = self._expected(id_, action, days)
        with closing(SqliteStore(self._path)) as store:
            if code == _REFUSED:
                assert expected is None
            elif code == 0 or self._in_store(store, id_) != self.known[id_]:  # or it died after its commit
                self._took(id_, action, days, store)
            else:
                assert code == _CRASHED

    @rule(id_=_ids, action=_actions, other=_actions)
    def two_people_act_at_once(self, id_: UUID, action: Action, other: Action) -> None:
        """Both have read the same state. The second decision is made on what the first one wrote."""
        with closing(Late(self._path)) as store, closing(SqliteStore(self._path)) as others:

            def meanwhile() -> None:
                self._tries(others, id_, other)

            store.before.append(meanwhile)
            self._tries(store, id_, action)

    # --- what always holds ---

    @invariant()
    def the_store_holds_what_was_accepted(self) -> None:
        """The store holds each accepted decision, and the log holds it once."""
        with closing(SqliteStore(self._path)) as store:
            for id_, record in self.known.items():
                assert self._in_store(store, id_) == record
                changes = list(store.history(f"exemptions/{id_}"))
                assert len(changes) == self.decisions[id_]
                bodies = [change.before for change in changes] + [store.get(f"exemptions/{id_}")]
                assert bodies[0] is None
                assert [change.after for change in changes] == bodies[1:]

    # --- how ---

    def _expected(self, id_: UUID, action: Action, days: int | None) -> Exemption | None:
        """The record that an action leads to; None if it is refused."""
        before, offer = self.known[id_], _OFFERS[id_.int]
        state = lifecycle.state_of(before, self.now)
        until = None if days is None else self.now + timedelta(days=days)
        if lifecycle.refusal(state, action) is not None:
            return None
        if action is Action.REQUEST:
            if offer in ("free-trial", "enterprise-agreement"):
                return None
            asked = Exemption(
                subscription=id_, state=ExemptionState.REQUESTED, requested=self.now, until=until, by="model",
                justification="why not",
            )  # fmt: skip
            if offer == "azure-sponsorship":
                return asked
            return replace(asked, state=ExemptionState.GRANTED, decided=self.now, by="self-service")
        assert before is not None
        match action:
            case Action.GRANT:
                until = until or before.until
                if until is not None and until <= self.now:
                    return None
                return replace(
                    before, state=ExemptionState.GRANTED, decided=self.now, until=until, by="model",
                    fraud_check=FraudCheck.PASS,
                )  # fmt: skip
            case Action.REJECT:
                return replace(
                    before, state=ExemptionState.REJECTED, decided=self.now, until=None, by="model", reason="no"
                )
            case Action.LIMIT:
                return replace(before, limit=RateLimit(per_minute=days or 9))
            case _:
                return replace(before, state=ExemptionState.REVOKED, decided=self.now, by="model", reason="spam")

    def _tries(self, store: SqliteStore, id_: UUID, action: Action, days: int | None = None) -> None:
        """Acts, and compares the result with the model's, for the state at the time of the write."""
        try:
            self._act(store, id_, action, days)
        except RefusedError:
            assert self._expected(id_, action, days) is None
        else:
            self._took(id_, action, days, store)

    def _act(self, store: SqliteStore, id_: UUID, action: Action, days: int | None) -> None:
        service = ExemptionService(store, _PRESET, actor="model", clock=lambda: self.now)
        until = None if days is None else self.now + timedelta(days=days)
        match action:
            case Action.REQUEST:
                service.request(id_, Application("why not", until=until))
            case Action.GRANT:
                service.grant(id_, check=FraudResult(FraudCheck.PASS), until=until, limit=None)
            case Action.REJECT:
                service.reject(id_, "no")
            case Action.LIMIT:
                service.limit(id_, RateLimit(per_minute=days or 9))
            case Action.REVOKE:
                service.revoke(id_, "spam")

    def _act_and_die(self, id_: UUID, action: Action, days: int | None, statement: int) -> int:
        with closing(SqliteStore(self._path)) as store:
            left = iter(range(statement - 1, -1, -1))
            store._database.connection.set_trace_callback(lambda _: next(left, 1) == 0 and os._exit(_CRASHED))
            try:
                self._act(store, id_, action, days)
            except RefusedError:
                return _REFUSED
        return 0

    def _took(self, id_: UUID, action: Action, days: int | None, store: SqliteStore) -> None:
        """Checks a decision that was made, and adds it to the model."""
        record, expected = self._in_store(store, id_), self._expected(id_, action, days)
        assert record is not None
        assert record == expected
        if record == self.known[id_]:
            return  # no change, so the log has no entry
        self.decisions[id_] += 1
        self.known[id_] = record
        self.now += timedelta(seconds=1)

    @staticmethod
    def _in_store(store: SqliteStore, id_: UUID) -> Exemption | None:
        key = f"exemptions/{id_}"
        body = store.get(key)
        record = None if body is None else decode(key, body)
        assert record is None or isinstance(record, Exemption)
        return record


def _in_a_process(work: Callable[[], int]) -> int:
    """Runs `work` in a child process, and returns its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


TestExempt = Exempt.TestCase
TestExempt.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
