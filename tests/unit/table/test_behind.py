"""Revisions behind a held change: their denials are enforced at once, and everything else waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portward.model import Attachment, Exemption, ExemptionState, Mode, RateLimit, Reason, Record, Standing
from portward.policy import presets
from portward.store.codec import key_of
from portward.store.confirmation import confirmation
from portward.store.values import Put
from portward.table.follower import Follower
from portward.table.writer import Writer
from unit.store.samples import opened, put, write
from unit.table.test_table import AZURE, ENFORCE, NOW, attachment, reason, subscription

DAY = timedelta(days=1)
SPAMMER = 99


def grant(number: int = SPAMMER, **more: object) -> Exemption:
    """A grant from two days ago."""
    fields: dict[str, object] = {"state": ExemptionState.GRANTED, "decided": NOW - 2 * DAY, **more}
    return Exemption(subscription=UUID(int=number), **fields)  # type: ignore[arg-type]


CUSTOMERS: list[Record] = [
    record for number in range(1, 41) for record in (subscription(number), attachment(f"10.0.0.{number}", number))
]
OTHERS: list[Record] = [
    subscription(SPAMMER, "pay-as-you-go"),
    attachment("10.0.1.1", SPAMMER, started=NOW - DAY),
    attachment("10.0.2.0/24", SPAMMER, started=NOW - DAY),
    grant(),
    subscription(98, "pay-as-you-go"),
    attachment("10.0.3.1", 98),
    subscription(97),
]
MISTAKE = [
    put(msgspec.structs.replace(subscription(number), standing=Standing.DISABLED)) for number in range(1, 41)
]


def revoked(number: int = SPAMMER) -> Exemption:
    """The record that a revocation writes."""
    return grant(number, state=ExemptionState.REVOKED, decided=NOW, reason="spam")


class Gateway:
    """A table that follows a store, with segment vni1 behind interface 1."""

    def __init__(self, folder: Path, share: float = 0.1) -> None:
        self.folder, self.share = folder, share
        self.store = opened(folder / "portward.db")
        self.start()
        self.writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)

    def start(self) -> None:
        """Opens table and store like an agent that starts."""
        self.writer = Writer(self.folder / "table", AZURE, ENFORCE, max_flip_share=self.share)
        self.follower = Follower(self.store, self.writer)

    def restart(self) -> None:
        """Closes and opens them like an agent that restarts."""
        self.writer.close()
        self.start()

    def follow(self) -> None:
        """Steps until nothing is left to do."""
        while self.follower.step(NOW) is not None:
            pass

    def write(self, *changes: Record | Put) -> None:
        """Writes one revision, and follows it."""
        write(self.store, *(change if isinstance(change, Put) else put(change) for change in changes))
        self.follow()

    def allows(self, source: str) -> bool:
        """Whether a worker lets a source pass."""
        found = self.writer.reader().lookup(1, ip_address(source).packed)
        assert found is not None
        return found.reason.allows or found.observed

    def held(self) -> int:
        """The held revision; 0 if none is held."""
        return 0 if self.follower.held is None else self.follower.held.revision

    def ahead(self) -> int:
        """The revision up to which denials are in force."""
        head = self.writer.head()
        assert head is not None
        assert (head.held, head.revision) == (self.held(), 1 if self.held() else self.store.revision())
        return head.ahead

    def close(self) -> None:
        self.writer.close()
        self.store.close()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that holds revision 2, which denies 40 of 43 customers by mistake."""
    with closing(Gateway(tmp_path)) as found:
        found.write(*CUSTOMERS, *OTHERS)
        found.write(*MISTAKE)
        assert found.held() == 2
        assert found.allows("10.0.1.1")
        yield found


DENIALS: dict[str, list[Record | Put]] = {
    "revocation": [revoked()],
    "standing": [subscription(SPAMMER, "pay-as-you-go", standing=Standing.DISABLED)],
    "offer": [subscription(SPAMMER, "no-such-offer")],
    "subscription removed": [Put(f"subscriptions/{UUID(int=SPAMMER)}", None)],
    "exemption removed": [Put(f"exemptions/{UUID(int=SPAMMER)}", None)],
    "attachment removed": [Put("attachments/vni1/10.0.1.1", None)],
    "attachment moved": [attachment("10.0.1.1", 98)],
    "attachment moved to an unknown customer": [attachment("10.0.1.1", 12345)],
    "started before the grant": [attachment("10.0.1.1", SPAMMER, started=NOW - 3 * DAY)],
    "end that has passed": [grant(until=NOW - DAY)],
    "together with others": [revoked(), grant(98), subscription(41), attachment("10.0.0.41", 41)],
    "disabled with a larger limit": [
        subscription(SPAMMER, "pay-as-you-go", standing=Standing.DISABLED),
        grant(limit=RateLimit(per_minute=9999)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", DENIALS.values(), ids=DENIALS)
def test_a_denial_is_enforced_ahead_of_what_is_held(gateway: Gateway, change: list[Record | Put]) -> None:
    gateway.write(*change)
    assert not gateway.allows("10.0.1.1")
    assert gateway.held() == 2
    assert gateway.ahead() == 3
    assert gateway.allows("10.0.0.1"), "the held change is not in force"
    assert not gateway.allows("10.0.3.1")
    assert not gateway.allows("10.0.0.41")


def test_a_more_specific_prefix_that_is_denied_is_enforced(gateway: Gateway) -> None:
    gateway.write(attachment("10.0.2.7", 98))
    assert not gateway.allows("10.0.2.7")
    assert gateway.allows("10.0.2.8")


def test_a_denied_prefix_inside_an_allowed_one_stays(gateway: Gateway) -> None:
    gateway.write(attachment("10.0.2.7", 98))
    gateway.write(Put("attachments/vni1/10.0.2.7", None))
    assert not gateway.allows("10.0.2.7")
    assert gateway.ahead() == 4


def test_two_removals_that_free_a_source_only_together_free_none(gateway: Gateway) -> None:
    """A revision removes an allowed prefix and a denied address inside it. It also lets another source of the
    prefix's owner pass, so the removal of the prefix waits. The removal of the address must wait too, or the
    address would pass."""
    gateway.write(attachment("10.0.2.7", 98), attachment("10.0.2.8", 98))
    gateway.write(
        Put("attachments/vni1/10.0.2.7", None),
        Put("attachments/vni1/10.0.2.0/24", None),
        attachment("10.0.4.1", SPAMMER, started=NOW - DAY),
    )
    assert not gateway.allows("10.0.2.7")
    assert not gateway.allows("10.0.4.1")


FREER: dict[str, tuple[list[Record | Put], str]] = {
    "grant": ([grant(98), attachment("10.0.3.1", 98, started=NOW)], "10.0.3.1"),
    "offer": ([subscription(98)], "10.0.3.1"),
    "observed": ([subscription(98, "pay-as-you-go", mode=Mode.OBSERVE)], "10.0.3.1"),
    "new customer": ([subscription(41), attachment("10.0.0.41", 41)], "10.0.0.41"),
    "attachment": ([attachment("10.0.5.1", 97)], "10.0.5.1"),
    "attachment moved": ([attachment("10.0.3.1", 97)], "10.0.3.1"),
    "mixed": (
        [Put("attachments/vni1/10.0.1.1", None), attachment("10.0.1.2", SPAMMER, started=NOW - DAY)], "10.0.1.2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", FREER.values(), ids=FREER)
def test_what_frees_a_source_waits(gateway: Gateway, change: tuple[list[Record | Put], str]) -> None:
    records, source = change
    gateway.write(*records)
    assert not gateway.allows(source)
    assert gateway.allows("10.0.1.1")
    assert gateway.ahead() == 3
    gateway.write(confirmation(4))
    assert gateway.allows(source)
    assert not gateway.allows("10.0.0.1")


@pytest.mark.parametrize("granted_first", [True, False])
def test_a_grant_that_lets_no_source_pass_yet_waits_too(gateway: Gateway, granted_first: bool) -> None:
    """A start that is recorded in the future would later let its machine send, without another revision."""
    start = attachment("10.0.3.1", 98, started=NOW + DAY)
    for record in (grant(98), start) if granted_first else (start, grant(98)):
        gateway.write(record)
    account = gateway.writer.reader().account_of(UUID(int=98))
    assert account is not None
    assert account.exemption is None
    gateway.writer.decide_due(now=NOW + 2 * DAY)
    assert not gateway.allows("10.0.3.1")


@pytest.mark.parametrize("rate", [1, 60])
def test_a_tighter_limit_is_enforced_and_a_wider_one_waits(gateway: Gateway, rate: int) -> None:
    gateway.write(grant(limit=RateLimit(per_minute=rate)))
    gateway.write(grant(limit=RateLimit(per_minute=30)))
    account = gateway.writer.reader().account_of(UUID(int=SPAMMER))
    assert account is not None
    assert account.exemption is not None
    assert account.exemption.limit == RateLimit(per_minute=min(rate, 30))


def test_an_earlier_end_is_in_force_when_it_comes(gateway: Gateway) -> None:
    gateway.write(grant(until=NOW + DAY))
    gateway.write(grant(until=NOW + 9 * DAY))
    assert gateway.allows("10.0.1.1")
    gateway.writer.decide_due(now=NOW + 2 * DAY)
    assert not gateway.allows("10.0.1.1")


def test_who_may_send_from_a_later_start_on_does_not_begin_before_it(tmp_path: Path) -> None:
    """The source moves to a customer who may always send, which would let it send a day early."""
    with closing(Gateway(tmp_path)) as found:
        found.write(
            *CUSTOMERS[10:],
            subscription(1, "enterprise-agreement"),
            subscription(2, "pay-as-you-go"), grant(2, decided=NOW - 2 * DAY),
            attachment("10.0.0.1", 2, started=NOW + DAY),
        )  # fmt: skip
        found.write(*MISTAKE[5:])
        assert found.held() == 2
        assert not found.allows("10.0.0.1")
        found.write(attachment("10.0.0.1", 1))
        assert not found.allows("10.0.0.1")
        found.write(confirmation(found.store.revision() + 1))
        assert found.allows("10.0.0.1")


def test_a_later_start_under_a_grant_is_no_more_than_an_earlier_one(tmp_path: Path) -> None:
    with closing(Gateway(tmp_path)) as found:
        found.write(
            *CUSTOMERS[10:],
            subscription(2, "pay-as-you-go"), grant(2, decided=NOW - 2 * DAY),
            attachment("10.0.0.1", 2, started=NOW - DAY),
        )  # fmt: skip
        found.write(*MISTAKE[5:])
        assert found.allows("10.0.0.1")
        found.write(attachment("10.0.0.1", 2, started=NOW + DAY))
        assert not found.allows("10.0.0.1")
        found.write(attachment("10.0.0.1", 2, started=NOW - DAY))
        assert not found.allows("10.0.0.1"), "that waits for the held change"


def test_many_denials_each_of_few_are_enforced(gateway: Gateway) -> None:
    for number in range(1, 31):
        gateway.write(Put(f"attachments/vni1/10.0.0.{number}", None))
    assert not any(gateway.allows(f"10.0.0.{number}") for number in range(1, 31))
    assert gateway.held() == 2
    assert gateway.allows("10.0.0.31")


def test_denials_that_came_while_no_agent_ran_are_enforced(gateway: Gateway) -> None:
    for number in range(1, 31):
        write(gateway.store, Put(f"attachments/vni1/10.0.0.{number}", None))
    gateway.restart()
    gateway.follow()
    assert not any(gateway.allows(f"10.0.0.{number}") for number in range(1, 31))
    assert (gateway.held(), gateway.ahead()) == (2, 32)
    assert gateway.allows("10.0.0.31")


def test_a_revision_that_refuses_too_many_waits_and_those_behind_it_do_not(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.write(*(Put(f"attachments/vni1/10.0.0.{number}", None) for number in range(1, 21)))
    assert gateway.allows("10.0.0.1")
    assert "revision 3 would flip the verdict of 20 of 43 subscriptions" in caplog.text
    gateway.write(revoked())
    assert not gateway.allows("10.0.1.1")
    assert (gateway.held(), gateway.ahead()) == (2, 4)


def test_many_that_are_confirmed_alone_are_enforced(gateway: Gateway) -> None:
    gateway.write(
        *(Put(f"attachments/vni1/10.0.0.{number}", None) for number in range(1, 21)), confirmation(3, alone=True)
    )
    assert not gateway.allows("10.0.0.1")
    assert gateway.allows("10.0.0.21")
    assert gateway.held() == 2


def test_early_denials_do_not_make_the_held_change_small_enough(tmp_path: Path) -> None:
    """The held change flips eleven, and ten may flip. Denying one of the eleven early does not let the other ten
    flip."""
    with closing(Gateway(tmp_path)) as gateway:
        gateway.write(*CUSTOMERS)
        gateway.write(*MISTAKE[:11])
        gateway.write(Put("attachments/vni1/10.0.0.1", None))
        assert not gateway.allows("10.0.0.1")
        assert gateway.held() == 2
        gateway.restart()
        gateway.follow()
        assert gateway.held() == 2
        assert gateway.allows("10.0.0.2")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_customer_that_was_denied_early_can_be_taken_back_with_the_rest(
    gateway: Gateway, restarted: bool
) -> None:
    gateway.write(revoked(), Put("attachments/vni1/10.0.0.5", None))
    if restarted:
        gateway.restart()
    gateway.write(*CUSTOMERS, *OTHERS)
    assert gateway.held() == 0
    assert gateway.allows("10.0.1.1")
    assert gateway.allows("10.0.0.5")
    assert gateway.ahead() == 0


def test_an_older_grant_does_not_come_back_in_between(tmp_path: Path) -> None:
    """The held change contains a newer grant, which the revocation behind it revokes. When the held change is
    confirmed by itself, the source must not pass before the revocation is read again."""
    with closing(Gateway(tmp_path)) as gateway:
        gateway.write(*CUSTOMERS, *OTHERS)
        gateway.write(*MISTAKE, grant(until=NOW + 9 * DAY))
        gateway.write(revoked())
        assert not gateway.allows("10.0.1.1")
        write(gateway.store, confirmation(2))
        gateway.writer.max_flip_share = 0.1
        while gateway.follower.step(NOW) is not None:
            assert not gateway.allows("10.0.1.1")
        assert gateway.held() == 0
        assert not gateway.allows("10.0.0.1")
        assert reason(gateway.writer, "10.0.1.1") is Reason.DENIED_REVOKED


def test_a_useless_confirmation_stops_nothing_behind_it(gateway: Gateway) -> None:
    gateway.write(Put("confirmed", "1"))
    gateway.write(revoked())
    assert not gateway.allows("10.0.1.1")
    assert gateway.held() == 2


def test_a_held_change_is_not_worked_out_again_for_each_later_one(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.writer, "apply", None)  # a call would raise
    gateway.write(revoked())
    gateway.write(grant(98))
    assert not gateway.allows("10.0.1.1")
    assert gateway.ahead() == 4


def test_another_preset_works_it_out_again(gateway: Gateway) -> None:
    """Under this preset no customer may send, so the change flips none."""
    gateway.write(revoked())
    gateway.writer.preset = msgspec.structs.replace(presets.load("azure-2020"), offers=())
    gateway.writer.decide_due(now=NOW)
    gateway.follow()
    assert gateway.held() == 0
    assert gateway.ahead() == 0


# --- any order of changes, against a table that is loaded at once ---

NUMBERS = st.integers(1, 5)
ADDRESSES = st.sampled_from(
    [*(f"10.0.0.{number}" for number in range(1, 5)), "10.0.0.0/24", "10.0.0.0/30", "::/0"]
)
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        subscription,
        NUMBERS,
        st.sampled_from(["enterprise-agreement", "pay-as-you-go"]),
        mode=st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.OBSERVE]),
        standing=st.sampled_from(Standing),
    ),
    st.builds(attachment, ADDRESSES, NUMBERS, started=st.sampled_from([None, NOW - DAY, NOW + DAY])),
    st.builds(
        grant,
        NUMBERS,
        state=st.sampled_from(ExemptionState),
        decided=st.sampled_from([NOW - 2 * DAY, NOW]),
        until=st.sampled_from([None, NOW + DAY]),
        limit=st.sampled_from([None, RateLimit(per_minute=1), RateLimit(per_minute=9)]),
    ),
)
CHANGES = st.lists(
    st.one_of(
        st.builds(put, RECORDS), st.builds(lambda record: Put(key_of(record), None), RECORDS)
    ),
    min_size=1, max_size=4, unique_by=lambda change: change.key,
)  # fmt: skip
SOURCES = [f"10.0.0.{number}" for number in range(8)] + ["2001:db8::1"]


def passing(gateway: Gateway) -> set[str]:
    """The sources that a worker lets pass."""
    return {source for source in SOURCES if gateway.allows(source)}


def state(writer: Writer) -> dict[str, tuple[object, ...]]:
    """Prefix, entry and account of each source in the table."""
    reader = writer.reader()
    found: dict[str, tuple[object, ...]] = {}
    for source in SOURCES:
        holding = reader.holding("vni1", ip_address(source))
        if holding is not None:
            entry = holding.entry._replace(subscription=0)
            found[source] = (holding.prefix, entry, holding.account)
    return found


@settings(max_examples=120, deadline=None)
@given(st.lists(RECORDS, max_size=14), st.lists(CHANGES, min_size=1, max_size=6), st.data())
def test_nothing_opens_while_held_and_then_the_table_is_that_of_the_store(
    have: list[Record], revisions: list[list[Put]], data: st.DataObject
) -> None:
    """The first change is held. No later change lets a source pass that did not pass before, with restarts at any
    point. After the confirmation, the table equals one that is loaded from the store at once."""
    with TemporaryDirectory() as first, TemporaryDirectory() as second, closing(Gateway(Path(first))) as gateway:
        gateway.write(*CUSTOMERS[10:], *{key_of(record): put(record) for record in have}.values())
        gateway.write(*MISTAKE[5:])
        assert gateway.held() == 2
        for revision in revisions:
            before = passing(gateway)
            gateway.write(*revision)
            assert passing(gateway) <= before
            if data.draw(st.booleans(), label="restart"):
                gateway.restart()
                gateway.follow()
                assert passing(gateway) <= before
        gateway.write(confirmation(gateway.store.revision() + 1))
        assert gateway.held() == 0
        with closing(Writer(Path(second), AZURE, ENFORCE)) as fresh:
            fresh.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
            Follower(gateway.store, fresh).step(NOW)
            expected = state(fresh)
        assert state(gateway.writer) == expected


def test_attachments_are_compared_as_the_table_holds_them(gateway: Gateway) -> None:
    reader = gateway.writer.reader()
    machine = attachment("10.0.1.1", SPAMMER, started=NOW - DAY)
    assert reader.record_like(attachment("10.0.1.1", 1)) == machine
    assert reader.record_like(attachment("10.0.1.2", 1)) is None
    assert reader.record_like(attachment("10.0.1.1", 1, segment="vni7")) is None
    assert isinstance(machine, Attachment)
