"""A playbook: steps on one gateway, each with the state that the kernel should have after it. The kernel has that
state after the next `apply`, whichever write it refuses, and after whichever write the process dies."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
import pytest

from portward.config.keys import Verdicts
from portward.dataplane.fake import FakeKernel, ProcessDied
from portward.dataplane.faketables import FakeTable
from portward.dataplane.names import FIXED_SETS, RATE_LIMITS, TABLE, VERDICT_SETS
from portward.dataplane.rate_limits import Bucket, RateLimits
from portward.dataplane.verdict_cache import Source
from portward.errors import KernelError
from portward.ipc.mark import PASSING, Class
from portward.policy import presets
from portward.table.commits import Committed, merged
from unit.dataplane.grounds import CONFIG, LINK, Plane, committed, source

HOST, OTHER, HOST6 = source("10.0.0.4"), source("10.9.9.9"), source("2001:db8::4")
ELSEWHERE, NEVER = source("10.0.0.4", link=8), source("10.0.0.66")
ALL: Final = frozenset((HOST, OTHER, HOST6, ELSEWHERE, NEVER))
BUCKET: Final = Bucket(5, 10, 2)
# Sets whose elements `apply` alone writes. The ruleset's fixed sets belong to its fingerprint.
_WRITTEN: Final = ("epoch", "synced", "coming", "unsettled", "known_interfaces", "gated", "enforced")
# More writes than any step makes.
_WRITES: Final = 10


class Step(NamedTuple):
    """A step: `act` does it and returns the change of the policy table, if any. `allowed` sources may send after
    it."""

    name: str
    act: Callable[[Plane], Committed | None]
    allowed: frozenset[Source]
    damaged: bool = False  # another program has taken the ruleset away


def known(plane: Plane) -> None:
    """A container starts."""
    plane.surroundings = plane.surroundings._replace(known=plane.surroundings.known | {20})


def stacked(plane: Plane) -> None:
    """A bridge takes a segment's packets, and another program translates addresses."""
    plane.surroundings = plane.surroundings._replace(stacked=frozenset((30,)), guard=True)


def plain(plane: Plane) -> None:
    """The bridge and the translation are gone."""
    plane.surroundings = plane.surroundings._replace(stacked=frozenset(), guard=False)


def taken(plane: Plane) -> None:
    """Another program deletes every rule."""
    plane.kernel.load("flush ruleset")


def lost(plane: Plane) -> None:
    """A change is committed to the table, and never reaches the kernel side."""
    plane.generation += 1


def reused(plane: Plane) -> None:
    """The interface has another owner, which the table does not have yet."""
    plane.unsettled.add([LINK], plane.generation)


def named(plane: Plane) -> Committed:
    """The table has the new owner."""
    plane.unsettled.settle(plane.generation)
    return committed(plane.generation + 1, links=[LINK])


def reloaded(plane: Plane) -> Committed:
    """Another preset, and sets of another lifetime, so that the kernel makes them anew."""
    plane.preset = presets.load("aws")
    plane.config = msgspec.structs.replace(CONFIG, verdicts=Verdicts(allow_seconds=30))
    return committed(plane.generation + 1, "10.9.9.9/32")


def overtaken(plane: Plane) -> Committed:
    """A repair takes the newest state of the table before two changes arrive, of which this is the first."""
    plane.generation += 2
    plane.kernel.load("flush chain inet portward screen")
    plane.sync.apply(plane.desired)
    return committed(plane.generation - 1, "10.0.0.4/32")


def behind_a_lost_one(plane: Plane) -> Committed:
    """A change is lost, and the next one arrives."""
    return committed(plane.generation + 2, "10.0.0.4/32")


def named_with_guard(plane: Plane) -> Committed:
    """The table has the new owner, and another program begins to translate addresses."""
    plane.surroundings = plane.surroundings._replace(guard=True)
    return named(plane)


def two(plane: Plane) -> Committed:
    """Two changes that waited, as one."""
    start = plane.generation
    return merged([committed(start + 1, "10.9.9.9/32"), committed(start + 2, "2001:db8::/64")])


PLAYBOOK: Final = (
    Step("start", lambda plane: None, frozenset((HOST, OTHER, HOST6, ELSEWHERE))),
    Step("a host is revoked", lambda p: committed(p.generation + 1, "10.0.0.4/32"), ALL - {HOST, NEVER}),
    Step("a host is allowed", lambda p: committed(p.generation + 1, "10.0.0.4/32"), ALL - {NEVER}),
    Step("a prefix is revoked", lambda p: committed(p.generation + 1, "10.0.0.0/16"), ALL - {HOST, NEVER}),
    Step("an interface comes", known, ALL - {HOST, NEVER}),
    Step("devices above segments", stacked, ALL - {HOST, NEVER}),
    Step("two changes at once", two, frozenset((ELSEWHERE,))),
    Step("another owner", reused, frozenset((ELSEWHERE,))),
    Step("the table names the owner", named, ALL - {NEVER}),
    Step("the rules are taken", taken, ALL - {NEVER}, damaged=True),
    Step("a repair comes first", overtaken, ALL - {HOST, NEVER}),
    Step("another configuration", reloaded, frozenset((HOST6, ELSEWHERE))),
    Step("a lost change", lost, frozenset((ELSEWHERE,))),
    Step("no devices any more", plain, frozenset((ELSEWHERE,))),
    Step("everything changes", lambda p: committed(p.generation + 1, everything=True), ALL - {OTHER, NEVER}),
    Step("another owner of allowed ones", reused, frozenset((ELSEWHERE,))),
    Step("a change behind it", lambda p: committed(p.generation + 1, "10.9.0.0/16"), frozenset((ELSEWHERE,))),
    Step("owner and surroundings", named_with_guard, ALL - {NEVER}),
    Step("a change behind a lost one", behind_a_lost_one, frozenset((ELSEWHERE,))),
    Step("nothing", lambda plane: None, frozenset((ELSEWHERE,))),
)  # fmt: skip


class Walk:
    """One gateway on its way through the playbook."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.plane, self.allowed = Plane(kernel), frozenset[Source]()

    def step(self, step: Step, fail: Callable[[FakeKernel], None]) -> None:
        """Takes a step in which the kernel fails, and applies once more if the kernel then has the wrong state. No
        source may pass that the policy denies both before and after the step."""
        plane, kernel = self.plane, self.plane.kernel
        denied, before = (ALL - self.allowed) & (ALL - step.allowed), plane.generation
        unsettled = plane.unsettled.indexes
        change = step.act(plane)
        if change is not None:
            plane.generation = max(plane.generation, change.generation)
        kernel.history.clear()
        for place in range(_WRITES):
            kernel.meanwhile(lambda: self._late(before), after=place)
        fail(kernel)
        try:
            plane.sync.apply(plane.desired, change)
        except (ProcessDied, OSError, KernelError):  # at a start, a refusal of the kernel ends the process too
            self.plane = again(plane)
        kernel._faults.clear()
        kernel._unreadable.clear()
        kernel.die(None)
        if not step.damaged and step is not PLAYBOOK[0]:
            assert all(classifies(tables) for tables in kernel.history)
        passed = {one for tables in kernel.history if classifies(tables) for one in denied if passes(tables, one)}
        assert not passed
        # An interface stays unsettled until the kernel has the generation with its owner.
        for tables in filter(classifies, kernel.history):
            if (plane.generation).to_bytes(4, "little") not in tables[TABLE].sets["synced"].elements:
                assert all(is_in(tables, "unsettled", link) for link in unsettled)
        self.allowed = step.allowed
        if self.plane is not plane or self.plane.sync.broken:
            self.plane.sync.apply(self.plane.desired)

    def _late(self, generation: int) -> None:
        """Workers give verdicts by the policy before the step."""
        for one in self.allowed:
            if TABLE in self.plane.kernel.tables and not is_in(self.plane.kernel.tables, "unsettled", one.link):
                self.plane.learn(Class.ALLOW, one, generation=generation)

    def cache(self) -> None:
        """Each source has sent, and the kernel has cached its verdict, or a rate limit for HOST6."""
        for one in ALL:
            if not is_in(self.plane.kernel.tables, "unsettled", one.link):
                self.plane.learn(Class.ALLOW if one in self.allowed else Class.DENY, one)
        if HOST6 in self.allowed:
            self.plane.rate_limits.add({HOST6: BUCKET})

    def wrong(self) -> list[str]:
        """The differences between this kernel's state and that of a new kernel after one `apply`."""
        plane = self.plane
        fresh = again(plane, FakeKernel(native=plane.kernel.native))
        fresh.sync.apply(fresh.desired)
        tables, wanted = plane.kernel.tables, fresh.kernel.tables
        found = [
            f"{name}: {tables[TABLE].sets[name].elements.keys()}"
            for name in _WRITTEN
            if tables[TABLE].sets[name].elements.keys() != wanted[TABLE].sets[name].elements.keys()
        ]
        found += [f"{part} of the ruleset" for part, is_same in same_rules(tables, wanted).items() if not is_same]
        found += [f"{one} passes" for one in ALL - self.allowed if passes(tables, one)]
        if not plane.rate_limits.equals(RateLimits.sources_in_kernel(plane.elements)):
            found.append("the rate limits are not those that are noted")
        if plane.sync.in_force != plane.desired:
            found.append(f"noted: {plane.sync.in_force}")
        return [*found, *([plane.sync.broken] if plane.sync.broken else [])]


def again(plane: Plane, kernel: FakeKernel | None = None) -> Plane:
    """A new process that should bring its kernel to the same state."""
    found = Plane(kernel or plane.kernel, plane.generation, plane.config)
    found.preset, found.surroundings, found.unsettled = plane.preset, plane.surroundings, plane.unsettled
    return found


def same_rules(tables: dict[str, FakeTable], wanted: dict[str, FakeTable]) -> dict[str, bool]:
    """Part of the rules → whether it is the same. Empty chains without a hook do not count, because they do
    nothing."""
    one, other = (
        {
            "tables": found.keys(),
            "chains": {n: (c.base, c.rules) for n, c in found[TABLE].chains.items() if c.base or c.rules},
            "sets": {name: set_.definition for name, set_ in found[TABLE].sets.items()},
            "elements": [found[TABLE].sets[name].elements.keys() for name in FIXED_SETS],
        }
        for found in (tables, wanted)
    )
    return {part: one[part] == other[part] for part in one}


def is_in(tables: dict[str, FakeTable], set_: str, link: int) -> bool:
    """Whether an interface is in a set."""
    return link.to_bytes(4, "little") in tables[TABLE].sets[set_].elements


def classifies(tables: dict[str, FakeTable]) -> bool:
    """Whether the ruleset is there, so that no packet passes by itself."""
    return TABLE in tables and bool(tables[TABLE].chains["screen"].rules and tables[TABLE].chains["learn"].rules)


def passes(tables: dict[str, FakeTable], one: Source) -> bool:
    """Whether a cached verdict or a rate limit lets a source pass."""
    gated = is_in(tables, "gated", one.link) and "gated" in tables[TABLE].chains["screen"].rules[0]
    sets = [VERDICT_SETS[verdict] for verdict in PASSING if verdict in VERDICT_SETS]
    cached = any(one.key in tables[TABLE].sets[name + one.family].elements for name in (*sets, RATE_LIMITS))
    return cached and not gated


@pytest.mark.parametrize("native", [True, False], ids=["native", "xtables"])
def test_after_each_step_the_kernel_holds_what_it_should(native: bool) -> None:
    walk = Walk(FakeKernel(native=native))
    for step in PLAYBOOK:
        walk.step(step, lambda kernel: None)
        assert walk.wrong() == [], step.name
        walk.cache()


FAILURES: Final[dict[str, Callable[[FakeKernel, int], None]]] = {
    "one write is refused": lambda kernel, number: kernel.refuse(errno.ENOMEM, after=number),
    "all writes are refused from then on": lambda kernel, number: kernel.refuse(
        errno.EPERM, after=number, times=_WRITES
    ),
    "the process dies": lambda kernel, number: kernel.die(number + 1),
    "a reading fails": lambda kernel, number: kernel.meanwhile(
        lambda: kernel.unreadable(errno.EINTR), after=number
    ),
}


@pytest.mark.parametrize("native", [True, False], ids=["native", "xtables"])
@pytest.mark.parametrize("number", range(_WRITES))
@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_fails_the_next_apply_makes_good(failure: str, number: int, native: bool) -> None:
    walk = Walk(FakeKernel(native=native))
    for step in PLAYBOOK:
        walk.step(step, lambda kernel: FAILURES[failure](kernel, number))
        assert walk.wrong() == [], step.name
        walk.cache()


def test_what_is_in_line_is_left_alone() -> None:
    """So the periodic check may apply again and again, and a change writes only the elements that it affects."""
    walk = Walk(FakeKernel())
    for step in PLAYBOOK:
        walk.step(step, lambda kernel: None)
        written = len(walk.plane.kernel.journal)
        assert walk.plane.check()
        assert len(walk.plane.kernel.journal) == written, step.name


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("native", [True, False])
def test_a_start_succeeds_if_another_program_flushes_the_ruleset_within_it(after: int, native: bool) -> None:
    """The first `apply` loads the ruleset again. Otherwise the agent would end, and port 25 be open until another
    one has started."""
    plane = Plane(FakeKernel(native=native))
    flushed: list[int] = []

    def flush() -> None:
        plane.kernel.load("flush ruleset")
        flushed.append(plane.kernel.generation)

    plane.kernel.meanwhile(flush, after=after)
    plane.start()
    # A flush after the last transaction of the start is found by the first check.
    plane.check()
    assert plane.reconciler.intact()
    assert plane.cache.synced() == plane.generation
    assert flushed or after >= 2, "the start makes at least this many transactions"
