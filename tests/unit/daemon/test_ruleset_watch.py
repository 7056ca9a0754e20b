"""When the ruleset is checked: at once for portward's own tables, seldom for those of other programs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from portward.daemon import ruleset_watch as module
from portward.daemon.ruleset_watch import RulesetWatch
from portward.daemon.steps import StepRunner
from portward.dataplane.monitor import LOST, NOTHING, RulesetChanges


class Ears:
    """Notices that a test gives."""

    def __init__(self) -> None:
        self.heard: list[RulesetChanges] = []
        self._theirs, self._ours = os.pipe()

    def fileno(self) -> int:
        """Readable after a notice."""
        return self._theirs

    def say(self, heard: RulesetChanges) -> None:
        """Gives a notice."""
        self.heard.append(heard)
        os.write(self._ours, b"x")

    def read(self) -> RulesetChanges:
        """The notices since the last call."""
        found = NOTHING
        for heard in self.heard:
            os.read(self._theirs, 1)
            found |= heard
        self.heard.clear()
        return found

    def close(self) -> None:
        """Closes both ends."""
        os.close(self._theirs)
        os.close(self._ours)


class Gateway:
    """A core that counts its checks, and a clock that a test sets."""

    def __init__(self) -> None:
        self.now, self.took, self.looks = 100.0, 0.0, 0
        self.guarded, self.rest = False, True
        self.ours, self.others, self.dataplane = Ears(), Ears(), self
        self.watch = RulesetWatch(
            cast("Any", self), self.kernel, (self.ours, self.others), StepRunner(lambda: self.now)
        )

    def at_rest(self, _: RulesetChanges) -> bool:
        """Whether nothing else is a reason for a check."""
        return self.rest

    def check(self) -> None:
        """A check."""
        self.looks += 1
        self.now += self.took

    async def kernel(self, work: Callable[[], None]) -> None:
        """Does it at once."""
        work()

    def take(self) -> int:
        """The number of checks that these notices cause."""
        before = self.looks
        asyncio.run(self.watch._take())
        return self.looks - before


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """A gateway without a guard, at rest."""
    found = Gateway()
    monkeypatch.setattr(module, "monotonic", lambda: found.now)
    yield found
    found.ours.close()
    found.others.close()


OURS, GAINED, GONE = (
    RulesetChanges(ours=True, others=True),
    RulesetChanges(gained=True, others=True),
    RulesetChanges(gone=True, others=True),
)
OTHERS = RulesetChanges(others=True)


def test_a_change_of_ours_is_looked_at_at_once_each_time(gateway: Gateway) -> None:
    gateway.took = 5.0
    for _ in range(3):
        gateway.ours.say(OURS)
        assert gateway.take() == 1
    assert gateway.take() == 0


def test_what_others_do_among_themselves_is_no_reason(gateway: Gateway) -> None:
    for _ in range(100):
        gateway.others.say(OTHERS)
    assert gateway.take() == 0


def test_without_a_notice_the_core_says_whether_to_look(gateway: Gateway) -> None:
    gateway.rest = False
    assert gateway.take() == 1


def test_a_chain_that_may_translate_is_looked_at_at_once_and_later_again(
    gateway: Gateway,
) -> None:
    gateway.took = 0.02
    gateway.others.say(GAINED)
    assert gateway.take() == 1
    gateway.others.say(GAINED)
    gateway.now += 0.19
    assert gateway.take() == 0, "that would be half of a core"
    gateway.now += 0.02
    assert gateway.take() == 1, "it was not forgotten"
    assert gateway.take() == 0


def test_it_is_looked_at_within_half_a_second_however_long_a_look_takes(gateway: Gateway) -> None:
    gateway.took = 3.0
    gateway.others.say(GAINED)
    assert gateway.take() == 1
    gateway.others.say(GAINED)
    gateway.now += 0.51
    assert gateway.take() == 1


@pytest.mark.parametrize(("guarded", "heard"), [(True, GAINED), (True, GONE), (False, GONE)])
def test_what_cannot_open_anything_waits_a_second_and_fifty_times_as_long(
    gateway: Gateway, guarded: bool, heard: RulesetChanges
) -> None:
    gateway.guarded, gateway.took = guarded, 0.1
    gateway.others.say(heard)
    assert gateway.take() == 1
    gateway.others.say(heard)
    gateway.now += 4.9
    assert gateway.take() == 0
    gateway.now += 0.2
    assert gateway.take() == 1


def test_lost_notices_are_looked_at_as_ours_but_not_all_the_time(gateway: Gateway) -> None:
    gateway.guarded, gateway.took = True, 0.02
    gateway.ours.say(LOST)
    assert gateway.take() == 1
    gateway.ours.say(LOST)
    assert gateway.take() == 0
    gateway.now += 0.21
    assert gateway.take() == 1


def test_what_was_lost_of_others_is_no_damage_of_ours(gateway: Gateway) -> None:
    gateway.guarded, gateway.took = True, 0.1
    gateway.others.say(LOST)
    assert gateway.take() == 1
    gateway.others.say(LOST)
    gateway.now += 1.0
    assert gateway.take() == 0


def test_a_look_that_fails_is_made_again_without_a_notice(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gateway, "check", lambda: 1 / 0)
        gateway.ours.say(OURS)
        assert gateway.take() == 0
    gateway.now += 1.1
    assert gateway.take() == 1


def test_what_was_changed_before_anybody_listened_is_looked_at_first(gateway: Gateway) -> None:
    """Another program may change the rules right after the load, before the first notice."""

    async def first_look() -> None:
        keeping = asyncio.create_task(gateway.watch.run())
        async with asyncio.timeout(60):
            while not gateway.looks:
                await asyncio.sleep(0.01)  # pause: of a poll
        keeping.cancel()
        await asyncio.wait({keeping})

    asyncio.run(first_look())
    assert gateway.looks == 1
    assert gateway.take() == 0, "once is enough"
