"""A change that would flip too many subscriptions is held by the agent until it is confirmed. `apply` refuses to
write it without a confirmation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portward.model import Exemption, ExemptionState, Mode, Record, Standing
from portward.store.codec import encode, key_of
from portward.store.confirmation import CONFIRMED, confirmation
from portward.store.flips import Flips, UnconfirmedError, flips
from portward.store.values import Put
from portward.table.follower import Follower
from portward.table.history import held_history
from portward.table.writer import Writer
from unit.store.samples import opened, put, write
from unit.table.test_table import AZURE, ENFORCE, NOW, attachment, reason, subscription

COUNT = 40
SHARE = 0.5


def customers(count: int = COUNT) -> list[Record]:
    """`count` allowed subscriptions with an address each."""
    records: list[Record] = []
    for number in range(1, count + 1):
        records += [subscription(number), attachment(f"10.0.0.{number}", number)]
    return records


def disabled(first: int, last: int) -> list[Put]:
    """Changes that deny these customers."""
    return [
        put(msgspec.structs.replace(subscription(number), standing=Standing.DISABLED))
        for number in range(first, last + 1)
    ]


class Gateway:
    """A store, and a table that follows it."""

    def __init__(self, folder: Path) -> None:
        self.store = opened(folder / "portward.db")
        self.writer = Writer(folder / "table", AZURE, ENFORCE, max_flip_share=SHARE)
        self.follower = Follower(self.store, self.writer)

    def step(self) -> int:
        """Follows the store; returns the revision in force."""
        self.follower.step(NOW)
        head = self.writer.head()
        return 0 if head is None else head.revision

    def close(self) -> None:
        self.writer.close()
        self.store.close()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that has loaded a store with `customers()`."""
    with closing(Gateway(tmp_path)) as found:
        write(found.store, *map(put, customers()))
        assert found.step() == 1
        found.writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
        yield found


def test_the_first_policy_is_not_held(gateway: Gateway) -> None:
    assert gateway.follower.held is None
    assert reason(gateway.writer, "10.0.0.4").allows


def test_half_of_all_may_flip(gateway: Gateway) -> None:
    write(gateway.store, *disabled(1, 20))
    assert gateway.step() == 2


def test_what_is_confirmed_alone_confirms_nothing_before_it(gateway: Gateway) -> None:
    write(gateway.store, *disabled(1, 21))
    write(gateway.store, *disabled(40, 40), confirmation(3, alone=True))
    assert gateway.step() == 1
    assert gateway.follower.held is not None
    assert reason(gateway.writer, "10.0.0.4").allows
    assert not reason(gateway.writer, "10.0.0.40").allows, "what comes behind it and only refuses is in force"
    write(gateway.store, confirmation(4))
    assert gateway.step() == 4
    assert not reason(gateway.writer, "10.0.0.40").allows


def test_what_is_confirmed_alone_may_flip_as_many_as_it_does(gateway: Gateway) -> None:
    write(gateway.store, *disabled(1, 2))
    write(gateway.store, *disabled(3, 40), confirmation(3, alone=True))
    write(gateway.store, put(subscription(1)))
    assert [gateway.step() for _ in range(3)] == [2, 3, 4]
    assert gateway.follower.held is None
    assert not reason(gateway.writer, "10.0.0.4").allows
    assert reason(gateway.writer, "10.0.0.1").allows


def test_more_is_held_until_it_is_confirmed(gateway: Gateway) -> None:
    write(gateway.store, *disabled(1, 21))
    assert gateway.step() == 1
    assert gateway.follower.held is not None
    assert (gateway.follower.held.revision, gateway.follower.held.flips) == (2, Flips(21, COUNT))
    assert reason(gateway.writer, "10.0.0.4").allows
    write(gateway.store, confirmation(3))
    assert gateway.step() == 3
    assert gateway.follower.held is None
    assert not reason(gateway.writer, "10.0.0.4").allows


def test_what_is_held_is_not_worked_out_again_and_again(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    write(gateway.store, *disabled(1, 21))
    gateway.step()
    monkeypatch.setattr(gateway.store, "changes", None)  # a call would raise
    assert gateway.step() == 1


def test_what_came_before_it_is_in_force(gateway: Gateway) -> None:
    write(gateway.store, *disabled(1, 1))
    write(gateway.store, *disabled(2, 23))
    assert gateway.step() == 2
    assert gateway.step() == 2
    assert gateway.follower.held is not None
    assert gateway.follower.held.revision == 3
    assert not reason(gateway.writer, "10.0.0.1").allows
    assert reason(gateway.writer, "10.0.0.2").allows


def test_what_takes_it_back_lets_it_through(gateway: Gateway) -> None:
    write(gateway.store, *disabled(1, 21))
    gateway.step()
    write(gateway.store, *map(put, customers()))
    assert gateway.step() == 3
    assert gateway.follower.held is None
    assert reason(gateway.writer, "10.0.0.4").allows


def test_a_greater_share_lets_it_through(gateway: Gateway) -> None:
    write(gateway.store, *disabled(1, 21))
    gateway.step()
    gateway.writer.max_flip_share = 1.0
    assert gateway.step() == 2


def test_what_comes_after_a_confirmation_is_not_confirmed(gateway: Gateway) -> None:
    write(gateway.store, *disabled(1, 21), confirmation(2))
    write(gateway.store, *map(put, customers()))
    assert gateway.step() == 2
    assert not reason(gateway.writer, "10.0.0.4").allows
    assert gateway.step() == 2
    assert gateway.follower.held is not None
    assert gateway.follower.held.flips == Flips(21, COUNT)


@pytest.mark.parametrize("body", ["99999999999999999999", "1", "0", "-3", "null", "x" * 5000, "３"])
def test_a_confirmation_of_something_else_confirms_nothing(gateway: Gateway, body: str) -> None:
    write(gateway.store, Put(CONFIRMED, body))
    assert gateway.step() == 2
    write(gateway.store, *disabled(1, 21))
    assert gateway.step() == 2
    assert gateway.follower.held is not None


def test_another_store_is_held_too(gateway: Gateway, tmp_path: Path) -> None:
    other = opened(tmp_path / "other.db")
    write(other, put(subscription(1)))
    follower = Follower(other, gateway.writer)
    follower.step(NOW)
    assert follower.held is not None
    assert follower.held.flips == Flips(COUNT, COUNT)
    assert reason(gateway.writer, "10.0.0.4").allows
    write(other, confirmation(2))
    follower.step(NOW)
    assert reason(gateway.writer, "10.0.0.4").allows, "another store may have been confirmed for another gateway"
    head = gateway.writer.head()
    assert head is not None
    write(other, confirmation(3, hold=held_history(head)))
    follower.step(NOW)
    assert not reason(gateway.writer, "10.0.0.4").allows
    other.close()


def test_another_preset_is_refused_by_a_reload(gateway: Gateway) -> None:
    gateway.writer.preset = msgspec.structs.replace(AZURE, offers=())
    with pytest.raises(UnconfirmedError, match="would flip the verdict of 40 of 40 subscriptions"):
        gateway.writer.decide_due(now=NOW, may_flip=False)
    assert reason(gateway.writer, "10.0.0.4").allows


def test_ten_are_never_held(tmp_path: Path) -> None:
    with closing(Gateway(tmp_path)) as gateway:
        write(gateway.store, *map(put, customers(10)))
        gateway.step()
        write(gateway.store, *disabled(1, 10))
        assert gateway.step() == 2


NUMBERS = st.integers(1, 3)
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        subscription,
        NUMBERS,
        st.sampled_from(["enterprise-agreement", "pay-as-you-go"]),
        mode=st.sampled_from(Mode),
        standing=st.sampled_from(Standing),
    ),
    st.builds(attachment, st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.0/24", "2001:db8::/64"]), NUMBERS),
    st.builds(
        lambda number, state: Exemption(subscription=UUID(int=number), state=state, decided=NOW),
        NUMBERS,
        st.sampled_from(ExemptionState),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(RECORDS, max_size=12), st.lists(st.tuples(st.booleans(), RECORDS), max_size=6))
def test_apply_and_the_agent_count_the_same(have: list[Record], changes: list[tuple[bool, Record]]) -> None:
    before = {key_of(record): encode(record) for record in have}
    batch = {key_of(record): encode(record) if keep else None for keep, record in changes}
    counted = flips(before, [Put(*one) for one in batch.items()], AZURE, NOW)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("portward.store.flips._FEW", 0)
        with closing(Gateway(Path(folder))) as gateway:
            gateway.writer.max_flip_share = 0
            write(gateway.store, *(Put(*one) for one in before.items()))
            gateway.step()
            write(gateway.store, *(Put(*one) for one in batch.items()))
            gateway.step()
            found = gateway.follower.held
            assert counted.flipped == (0 if found is None else found.flips.flipped)
