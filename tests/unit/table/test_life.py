"""The policy table is compared with a simple model. In any order, records come and go, time passes, presets, links
and stores change, and the agent restarts.
"""

from __future__ import annotations

import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import hypothesis.strategies as st
import msgspec
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from portward.model import Attachment, Exemption, ExemptionState, Mode, RateLimit, Reason, Record, Subscription
from portward.policy.decide import decide
from portward.policy.preset import Preset
from portward.table.invariants import Walk
from portward.table.writer import Writer
from unit.table.test_load import contents
from unit.table.test_table import (
    AZURE,
    ENFORCE,
    NETWORKS,
    NOW,
    OFFERS,
    SOURCES,
    STORE,
    attachments,
    identity,
    subscription,
    subscriptions,
)

# The bundled preset, one under which a grant counts without a restart, and one that knows no offer.
PRESETS: Final = {
    "restart": AZURE,
    "at once": msgspec.structs.replace(AZURE, restart=""),
    "nothing": msgspec.structs.replace(AZURE, offers=(), otherwise=None),
}
_HOURS: Final = st.sampled_from([-48, -1, 0, 1, 2, 30])
_ids: Final = st.integers(1, 4)


class Table(RuleBasedStateMachine):
    """`held` has the records that the table was given, by key."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="portward-table-")
        self.now = NOW
        self.preset: Preset = AZURE
        self.answers = ENFORCE
        self.held: dict[tuple[object, ...], Record] = {}
        self.links = {1: ("vni1", False), 2: ("vni2", False)}
        self.revision = 1
        self.writer = self._open()
        self.writer.replace([], revision=1, store=STORE, now=self.now)
        self._link()
        # A table for the result of a full load. All steps share it, because making a table takes many commits.
        self.fresh = Writer(Path(self._folder.name) / "fresh", AZURE, ENFORCE)

    def teardown(self) -> None:
        self.writer.close()
        self.fresh.close()
        self._folder.cleanup()

    # --- what happens ---

    @rule(hours=st.sampled_from([0, 1, 1, 2, 29]))
    def time_passes(self, hours: int) -> None:
        """Time passes, and the agent settles what is due."""
        self.now += timedelta(hours=hours, seconds=1)
        self._settle()

    @rule(seconds=st.sampled_from([1, 3600, 7200]))
    def a_change_comes_before_what_is_due(self, seconds: int) -> None:
        """Time passes; the agent settles only after the next change."""
        self.now += timedelta(seconds=seconds)
        self._apply([], [])
        self._settle()

    @rule(changes=st.lists(subscriptions, min_size=1, max_size=3))
    def customers_change(self, changes: list[Record]) -> None:
        """New customers come, or offers, standings and modes change."""
        self._apply(changes, [])

    @rule(found=attachments, hours=_HOURS, paces=st.sampled_from([0, 0, 3600]))
    def a_machine_starts(self, found: Attachment, hours: int, paces: int) -> None:
        """A machine's start is recorded, perhaps by a fast clock, in the future. Before it, time may have passed
        that the agent has not settled yet."""
        self.now += timedelta(seconds=paces)
        self._apply([msgspec.structs.replace(found, started=self.now + timedelta(hours=hours))], [])
        if paces:
            self._settle()

    @rule(found=attachments)
    def a_machine_without_a_start(self, found: Attachment) -> None:
        """A machine comes without a start, as from a portal that does not send starts."""
        self._apply([msgspec.structs.replace(found, started=None)], [])

    @rule(
        number=_ids,
        state=st.sampled_from([ExemptionState.GRANTED, ExemptionState.GRANTED, *ExemptionState]),
        decided=st.sampled_from([-50, -3, 0]),
        until=st.sampled_from([None, -1, 1, 2, 30]),
        limit=st.sampled_from([None, RateLimit(per_minute=60)]),
    )
    def an_exemption_changes(
        self, number: int, state: ExemptionState, decided: int, until: int | None, limit: RateLimit | None
    ) -> None:
        """An exemption is granted, perhaps with an end or a limit, or gets another state."""
        exemption = Exemption(
            subscription=UUID(int=number),
            state=state,
            decided=self.now + timedelta(hours=decided),
            until=None if until is None else self.now + timedelta(hours=until),
            limit=limit,
        )
        self._apply([exemption], [])

    @rule(number=_ids, offer=st.sampled_from(OFFERS), hours=_HOURS)
    def a_customer_comes_with_all(self, number: int, offer: str, hours: int) -> None:
        """A customer comes with all records in one batch, as from an inventory."""
        grant = Exemption(
            subscription=UUID(int=number),
            state=ExemptionState.GRANTED,
            decided=self.now - timedelta(days=1),
            until=self.now + timedelta(hours=2),
        )
        machines = [
            Attachment(
                segment="vni1",
                address=network,
                subscription=UUID(int=number),
                started=self.now + timedelta(hours=hours),
            )
            for network in NETWORKS[4:6]
        ]
        self._apply([*machines, grant, subscription(number, offer)], [])

    @rule(data=st.data(), count=st.integers(1, 4))
    def records_go(self, data: st.DataObject, count: int) -> None:
        """Some existing records are removed."""
        if self.held:
            keys = data.draw(st.lists(st.sampled_from(sorted(self.held, key=repr)), max_size=count, unique=True))
            self._apply([], [self.held[key] for key in keys])

    @rule(number=_ids, attached=st.booleans())
    def a_customer_leaves(self, number: int, attached: bool) -> None:
        """All records of a customer are removed or, if not `attached`, all but the attachments."""
        gone = [
            record
            for key, record in self.held.items()
            if (isinstance(record, Attachment) and attached and record.subscription.int == number)
            or key[1:] == (UUID(int=number),)
        ]
        self._apply([], gone)

    @rule(record=subscriptions | attachments)
    def what_is_not_there_goes(self, record: Record) -> None:
        """A record is removed that may not exist."""
        self._apply([], [record])

    @rule(name=st.sampled_from(sorted(PRESETS)))
    def another_preset(self, name: str) -> None:
        """A reload brings another preset."""
        self.preset = self.writer.preset = PRESETS[name]
        self._settle()

    @rule(observe=st.booleans(), reject=st.booleans())
    def another_mode(self, observe: bool, reject: bool) -> None:
        """A reload changes whether verdicts are observed, or packets rejected."""
        self.answers = self.writer.answers = ENFORCE._replace(observe=observe, reject=reject)
        self._settle()

    @rule(observed=st.booleans(), swapped=st.booleans())
    def links_change(self, observed: bool, swapped: bool) -> None:
        """Interfaces are made again, and may swap their indexes."""
        first, second = ("vni2", "vni1") if swapped else ("vni1", "vni2")
        self.links = {1: (first, observed), 2: (second, False)}
        self._link()

    @rule()
    def everything_is_read_anew(self) -> None:
        """The table is loaded from the store again, as after damage."""
        self.revision += 1
        self.writer.replace(self._records(), revision=self.revision, store=STORE, now=self.now)

    @rule(preset=st.sampled_from(sorted(PRESETS)), hours=st.sampled_from([0, 1, 30]))
    def the_agent_starts_again(self, preset: str, hours: int) -> None:
        """The agent restarts, perhaps later, and perhaps with another preset."""
        self.writer.close()
        self.now += timedelta(hours=hours)
        self.preset = PRESETS[preset]
        self.writer = self._open()
        self._settle()
        self._link()

    # --- what always holds ---

    @invariant()
    def every_source_is_answered_as_by_the_records(self) -> None:
        """A lookup gives the reason that `decide` gives for the records, with the modes applied."""
        reader = self.writer.reader()
        for index, (segment, observed) in self.links.items():
            for source in SOURCES:
                found = reader.lookup(index, source.packed)
                assert found is not None
                covering = [
                    one
                    for one in self.held.values()
                    if isinstance(one, Attachment) and one.segment == segment and source in one.address
                ]
                best = max(covering, key=lambda one: one.address.prefixlen, default=None)
                owner = None if best is None else self.held.get(("subscription", best.subscription))
                grant = None if best is None else self.held.get(("exemption", best.subscription))
                assert owner is None or isinstance(owner, Subscription)
                assert grant is None or isinstance(grant, Exemption)
                reason = decide(
                    self.preset, subscription=owner, exemption=grant, attachment=best, now=self.now
                ).reason
                watched = observed or self.answers.observe or (owner is not None and owner.mode is Mode.OBSERVE)
                limited = reason is Reason.ALLOWED_EXEMPT and grant is not None and grant.limit is not None
                assert found[:3] == (reason, watched, self.answers.reject and best is not None)
                assert (found.limited, found.damaged) == (limited, False)

    @invariant()
    def the_invariants_hold(self) -> None:
        """The check finds no violation, and no row counts as damaged."""
        with self.writer._environment.begin() as transaction:
            assert list(Walk(transaction, self.writer._parts, self.now).findings()) == []
        assert self.writer.damage.rows == 0

    @invariant()
    def it_is_what_a_load_of_the_same_records_is(self) -> None:
        """The table equals one that is loaded from the same records. Internal numbers may differ, and names of
        empty segments may stay."""
        self.fresh.preset, self.fresh.answers = self.preset, self.answers
        self.fresh.replace(self._records(), revision=self.revision, store=STORE, now=self.now)
        wanted, next_expiry = contents(self.fresh), self.fresh.next_expiry()
        found = contents(self.writer)
        # The key of a family without attachments may stay, with an empty list of lengths.
        found["lengths"] = [row for row in found["lengths"] if row[-1]]
        for part, rows in wanted.items():
            assert sorted(found[part], key=repr) == sorted(rows, key=repr), part
        assert self.writer.next_expiry() == next_expiry
        assert next_expiry is None or next_expiry > self.now

    # --- how ---

    def _records(self) -> list[Record]:
        return sorted(self.held.values(), key=lambda record: isinstance(record, Attachment))

    def _open(self) -> Writer:
        return Writer(Path(self._folder.name) / "table", self.preset, self.answers)

    def _apply(self, put: list[Record], removed: list[Record]) -> None:
        self.revision += 1
        for record in removed:
            self.held.pop(identity(record), None)
        for record in put:
            self.held[identity(record)] = record
        self.writer.apply(put, removed, revision=self.revision, now=self.now)

    def _settle(self) -> None:
        self.writer.decide_due(now=self.now)

    def _link(self) -> None:
        self.writer.put_links(self.links, touched=frozenset(), now=self.now)


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def _time(hours: float) -> datetime:
    return NOW + timedelta(hours=hours)


def test_a_start_recorded_ahead_goes_with_its_subscription(tmp_path: Path) -> None:
    """The grants of other customers still end in time."""
    writer = Writer(tmp_path, AZURE, ENFORCE)
    grants = {
        number: Exemption(
            subscription=UUID(int=number), state=ExemptionState.GRANTED, decided=_time(-24), until=until
        )
        for number, until in ((1, None), (2, _time(2)))
    }
    machines = {
        number: Attachment(segment="vni1", address=network, subscription=UUID(int=number), started=_time(start))
        for number, network, start in ((1, NETWORKS[4], 1), (2, NETWORKS[5], -1))
    }
    for number in (1, 2):
        records: list[Record] = [subscription(number, "csp"), grants[number], machines[number]]
        writer.apply(records, [], revision=number, now=NOW)
    writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
    assert writer.next_expiry() == _time(1)
    writer.apply([], [subscription(1, "csp"), grants[1], machines[1]], revision=3, now=_time(0.5))
    assert writer.next_expiry() == _time(2)
    assert [str(place.network) for place in writer.decide_due(now=_time(3)).changed] == ["10.0.0.2/32"]
    writer.close()


def test_a_start_beyond_what_fits_never_comes(tmp_path: Path) -> None:
    """The store accepts years up to 9999, but a row of the table only up to 4253."""
    writer = Writer(tmp_path, AZURE, ENFORCE)
    late = datetime(9999, 12, 29, tzinfo=NOW.tzinfo)
    grant = Exemption(subscription=UUID(int=1), state=ExemptionState.GRANTED, decided=_time(-24))
    machine = Attachment(segment="vni1", address=NETWORKS[4], subscription=UUID(int=1), started=late)
    edited: list[Record] = [subscription(1, "csp"), grant, machine]
    for load in (False, True):
        if load:
            writer.replace(edited, revision=2, store=STORE, now=NOW)
        else:
            writer.apply(edited, [], revision=1, now=NOW)
        found = writer.reader().holding("vni1", SOURCES[0])
        assert found is not None
        assert found.entry.reason is Reason.DENIED_RESTART_REQUIRED
        expiry = writer.next_expiry()
        assert expiry is not None
        assert expiry.year == 4253
    writer.close()
