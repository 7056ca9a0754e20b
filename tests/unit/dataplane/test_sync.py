"""Changes of the policy table become transactions: their order, and their result if the kernel refuses one, if
another program writes in between, and if the process dies after any of them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from portward.dataplane import ruleset, templates
from portward.dataplane import verdict_cache as cache
from portward.dataplane.elements import Add, Delete
from portward.dataplane.fake import FakeKernel, ProcessDied
from portward.dataplane.faketables import FakeTable
from portward.dataplane.names import TABLE, VERDICT_SETS
from portward.dataplane.rate_limits import Bucket
from portward.dataplane.setdump import DeletedElement
from portward.dataplane.verdict_cache import Source
from portward.ipc.mark import PASSING, Class
from portward.table.commits import Committed, merged
from unit.dataplane.grounds import LINK, PRESET, Plane, committed, source, words

HOST, OTHER, HOST6 = source("10.0.0.4"), source("10.9.9.9"), source("2001:db8::4")
ELSEWHERE = source("10.0.0.4", link=8)
BUCKET = Bucket(5, 10, 2)

# Name → the sources among HOST, HOST6, OTHER and ELSEWHERE that a change affects, and the change for a generation.
CHANGES: dict[str, tuple[set[Source], Callable[[int], Committed]]] = {
    "host": ({HOST}, lambda generation: committed(generation, "10.0.0.4/32")),
    "two hosts": ({HOST, HOST6}, lambda generation: committed(generation, "10.0.0.4/32", "2001:db8::4/128")),
    "prefix": ({HOST}, lambda generation: committed(generation, "10.0.0.0/24")),
    "prefix 6": ({HOST6}, lambda generation: committed(generation, "2001:db8::/64")),
    "odd prefix": ({HOST}, lambda generation: committed(generation, "10.0.0.4/31")),
    "mixed": ({HOST, HOST6}, lambda generation: committed(generation, "2001:db8::/32", "10.0.0.4/32")),
    "links": ({HOST, HOST6, OTHER}, lambda generation: committed(generation, links=[LINK])),
    "everything": (
        {HOST, HOST6, OTHER, ELSEWHERE},
        lambda generation: committed(generation, everything=True),
    ),
}
NEW = (2).to_bytes(4, "little")  # generation 2 as an element
ALL = [HOST, HOST6, OTHER, ELSEWHERE]


@pytest.fixture(params=[True, False], ids=["native", "xtables"])
def kernel(request: pytest.FixtureRequest) -> FakeKernel:
    """A kernel without rules, with and without nft_queue."""
    return FakeKernel(native=request.param)


@pytest.fixture
def plane(kernel: FakeKernel) -> Plane:
    """A gateway that enforces generation 1, and has cached that every source may send."""
    found = Plane(kernel)
    found.start()
    assert found.learn(Class.ALLOW, *ALL)
    kernel.journal.clear()
    kernel.history.clear()
    return found


@pytest.fixture(params=["no gate", "gate", "gate for what also opens"])
def opens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether changes may also let packets pass. Two of the three cases use a gate however few verdicts are
    cached."""
    if request.param != "no gate":
        monkeypatch.setattr(cache, "MIN_GATED_ELEMENTS", -1)
    return bool(request.param != "gate")


def is_gated(tables: dict[str, FakeTable], link: int) -> bool:
    """Whether no cached verdict lets packets from this interface pass."""
    table = tables[TABLE]
    gated = link.to_bytes(4, "little") in table.sets["gated"].elements
    return gated and table.chains["screen"].rules[0] == "iif @gated goto gate"


def stale(tables: dict[str, FakeTable], sources: set[Source]) -> set[Source]:
    """The sources that a cached verdict lets pass."""
    return {
        one
        for verdict, one in product(PASSING, sources)
        if verdict in VERDICT_SETS and one.key in tables[TABLE].sets[VERDICT_SETS[verdict] + one.family].elements
    }


def classifies(tables: dict[str, FakeTable]) -> bool:
    """Whether the ruleset is there, so that no packet passes by itself."""
    table = tables.get(TABLE)
    return (
        table is not None
        and not table.flags
        and bool(table.chains["screen"].rules and table.chains["learn"].rules)
    )


# --- what is written, in which order ---


def test_a_host_is_forgotten_after_the_epoch_has_moved_and_synced_is_written_with_it(plane: Plane) -> None:
    plane.kernel.learn("allow4", HOST.key, packets=7)
    plane.enforce(committed(2, "10.0.0.4/32"))
    assert words(plane.kernel.journal) == [
        "flush epoch, add epoch 2, add recent 1",
        "forget 3 . 10.0.0.4, flush synced, add synced 2",
    ]
    gone = [one for one in plane.deletions.take() or [] if one.packets]
    assert gone == [DeletedElement("allow4", HOST.key, 7)], "the kernel says what it had counted"


def test_a_prefix_is_read_and_taken_out_of_the_sets_that_hold_it(plane: Plane) -> None:
    plane.learn(Class.DENY, source("10.0.0.5"))
    plane.enforce(committed(2, "10.0.0.0/24"))
    assert words(plane.kernel.journal) == [
        "flush epoch, add epoch 2, add recent 1",
        "delete allow4 3 . 10.0.0.4",
        "delete deny4 3 . 10.0.0.5",
        "flush synced, add synced 2",
    ]


def test_a_change_of_interfaces_is_written_with_the_epoch(plane: Plane) -> None:
    """So a verdict that was found before the change is not cached after it."""
    plane.enforce(committed(2, links=[LINK]))
    key = LINK.to_bytes(4, "little")
    assert words(plane.kernel.journal)[0].startswith("flush epoch, add epoch 2, add recent 1, ")
    # Deleted in between, because adding an existing element would not restart its timeout.
    again = (Add("renewed", [key]), Delete("renewed", [key]), Add("renewed", [key]))
    assert plane.kernel.journal[0].done[-3:] == again


def test_a_change_of_interfaces_that_a_repair_has_overtaken_is_written_all_the_same(plane: Plane) -> None:
    """The repair has moved the epoch, but verdicts of the forward guard carry no epoch."""
    plane.generation = 2
    assert not plane.check()
    assert not plane.kernel.tables[TABLE].sets["renewed"].elements
    plane.enforce(committed(2, links=[LINK]))
    assert set(plane.kernel.tables[TABLE].sets["renewed"].elements) == {LINK.to_bytes(4, "little")}


def unsettled(plane: Plane) -> set[bytes]:
    """The interfaces whose packets are dropped."""
    return set(plane.kernel.tables[TABLE].sets["unsettled"].elements)


def test_an_interface_is_unsettled_and_renewed_before_anything_is_read(plane: Plane) -> None:
    plane.unsettle(LINK, 1)
    assert words(plane.kernel.journal)[0] == "add unsettled 3, add renewed 3, delete renewed 3"
    plane.enforce(committed(2, links=[LINK]), settled=1)
    assert not unsettled(plane)


def test_an_interface_that_the_table_has_taken_in_meanwhile_is_not_unsettled(plane: Plane) -> None:
    """Otherwise it would stay unsettled for ever."""
    plane.enforce(committed(2, links=[LINK]), settled=2)
    plane.unsettle(LINK, 2)
    assert not unsettled(plane)
    plane.unsettle(LINK, 3)
    assert unsettled(plane)


def test_an_interface_stays_unsettled_while_the_kernel_stands_at_the_owner_before(plane: Plane) -> None:
    """The verdicts for the previous owner have the epoch in force, so they would be cached."""
    plane.unsettle(LINK, 1)
    plane.kernel.refuse(errno.ENOMEM, times=2)
    plane.enforce(committed(2, links=[LINK]), settled=1)
    assert plane.cache.epoch() == 1
    assert unsettled(plane)
    assert not plane.check()
    assert plane.cache.epoch() == 2
    assert not unsettled(plane)


def test_a_repair_that_has_not_forgotten_yet_says_of_no_change_that_it_is_in_force(plane: Plane) -> None:
    """This holds for the last change and for the one before, which the repair includes."""
    plane.learn(Class.ALLOW, HOST)
    plane.kernel.die(1)
    plane.generation = 3
    with pytest.raises(ProcessDied):
        plane.check()
    plane.kernel.die(None)
    assert HOST in plane.cached()
    assert [generation for generation in range(1, 10) if plane.cache.enforces(generation)] == []


def test_everything_is_flushed(plane: Plane) -> None:
    plane.enforce(committed(2, everything=True))
    assert words(plane.kernel.journal) == [
        "flush epoch, add epoch 2, add recent 1",
        "forget everything, flush synced, add synced 2",
    ]


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_change_reaches_is_forgotten_and_nothing_else(plane: Plane, kind: str, opens: bool) -> None:
    reached, change = CHANGES[kind]
    plane.enforce(change(2)._replace(opens=opens))
    assert set(plane.cached()) == set(ALL) - reached
    assert (plane.cache.epoch(), plane.cache.synced()) == (2, 2)
    assert (plane.sync.generation, plane.reconciler.repairs) == (2, 0)
    assert plane.check(), "our own transactions are not taken for another program's"


@pytest.mark.parametrize("kind", CHANGES)
def test_the_epoch_is_first_and_what_says_in_sync_is_last(plane: Plane, kind: str) -> None:
    plane.enforce(CHANGES[kind][1](2))
    first, *_, last = words(plane.kernel.journal)
    links = f", add renewed {LINK}, delete renewed {LINK}" if kind == "links" else ""
    assert first == f"flush epoch, add epoch 2, add recent 1{links}"
    assert last.endswith("flush synced, add synced 2")
    assert sum("synced" in line for line in words(plane.kernel.journal)) == 1


def test_without_a_change_of_verdicts_nothing_is_written(plane: Plane) -> None:
    plane.enforce(Committed(9, 1))
    assert not plane.kernel.journal


def test_a_segment_without_an_interface_has_nothing_to_forget(plane: Plane) -> None:
    plane.enforce(committed(2, "10.0.0.4/32", "10.0.0.0/8", segment="vni7"))
    assert set(plane.cached()) == set(ALL)
    assert (plane.cache.epoch(), plane.cache.synced()) == (2, 2)


def test_many_hosts_are_searched_for_instead_of_written_into_every_set(plane: Plane) -> None:
    hosts = [f"10.0.{n >> 8}.{n & 255}/32" for n in range(5_000)]
    plane.enforce(committed(2, *hosts))
    assert set(plane.cached()) == {HOST6, OTHER, ELSEWHERE}
    assert words(plane.kernel.journal)[1] == "delete allow4 3 . 10.0.0.4"


def test_a_source_with_a_limit_loses_it_and_gets_the_new_one_at_once(plane: Plane) -> None:
    plane.rate_limits.add({HOST: BUCKET})
    plane.limits = {HOST: Bucket(5, 99, 2)}
    plane.kernel.journal.clear()
    plane.enforce(committed(2, "10.0.0.4/32"))
    assert words(plane.kernel.journal) == [
        "flush epoch, add epoch 2, add recent 1",
        "forget 3 . 10.0.0.4, delete rates4 3 . 10.0.0.4, flush synced, add synced 2",
        "limit s5-99-2 99/minute burst 2, draw rates4 3 . 10.0.0.4: s5-99-2",
    ]


@pytest.mark.parametrize("kind", ["prefix", "links", "everything"])
def test_a_wide_change_takes_the_limits_it_reaches(plane: Plane, kind: str) -> None:
    plane.rate_limits.add({HOST: BUCKET})
    plane.enforce(CHANGES[kind][1](2))
    assert not plane.elements.elements("rates4")
    assert not list(plane.rate_limits.sources())


# --- the gate ---


GATE = "flush gated, flush enforced, add gated 3, insert screen iif @gated goto gate"
LIFT = "delete a rule of screen, flush gated, flush enforced, flush synced, add synced 2"


@pytest.fixture
def much(plane: Plane) -> Plane:
    """The same gateway after a reading has shown that much is cached."""
    plane.cache.sizes["allow4"] = 8_193
    return plane


def test_a_large_revocation_is_in_force_before_the_sets_are_read(much: Plane) -> None:
    much.learn(Class.DENY, source("10.0.0.5"))
    much.enforce(committed(2, "10.0.0.0/24")._replace(opens=False))
    assert words(much.kernel.journal) == [
        "flush epoch, add epoch 2, add recent 1",
        f"{GATE}, add enforced 2",
        "delete allow4 3 . 10.0.0.4",
        LIFT,
        "delete deny4 3 . 10.0.0.5",
    ]
    assert much.check(), "our own transactions are not taken for another program's"


def test_of_a_change_that_also_opens_only_the_end_of_the_search_says_that_it_is_in_force(much: Plane) -> None:
    """Until then a cached denial may still stop a source that the change lets pass."""
    much.learn(Class.DENY, source("10.0.0.5"))
    much.enforce(committed(2, "10.0.0.0/24"))
    assert words(much.kernel.journal)[1:] == [
        GATE,
        "delete allow4 3 . 10.0.0.4",
        "delete deny4 3 . 10.0.0.5",
        LIFT,
    ]


def test_many_revoked_hosts_and_a_lost_interface_have_a_gate_too(much: Plane) -> None:
    hosts = [f"10.0.{n >> 8}.{n & 255}/32" for n in range(5_000)]
    much.enforce(committed(2, *hosts)._replace(opens=False))
    assert words(much.kernel.journal)[1] == f"{GATE}, add enforced 2"
    much.cache.sizes["allow4"] = 8_193
    much.kernel.journal.clear()
    much.unsettle(LINK, 1)
    assert GATE in words(much.kernel.journal)
    assert not is_gated(much.kernel.tables, LINK)


@pytest.mark.parametrize(
    ("size", "closes"), [(8_192, True), (8_193, False)], ids=["little is cached", "nothing is stopped"]
)
def test_a_change_that_needs_no_gate_has_none(plane: Plane, size: int, closes: bool) -> None:
    plane.cache.sizes["allow4"] = size
    plane.enforce(committed(2, "10.0.0.0/24")._replace(closes=closes))
    assert not any("gate" in line for line in words(plane.kernel.journal))


def test_the_rate_limits_of_revoked_sources_go_with_the_gate(much: Plane) -> None:
    much.rate_limits.add({HOST: BUCKET})
    much.kernel.journal.clear()
    much.enforce(committed(2, "10.0.0.0/24")._replace(opens=False))
    assert words(much.kernel.journal)[1] == f"delete rates4 3 . 10.0.0.4, {GATE}, add enforced 2"


def test_the_kernel_says_that_a_change_is_in_force_from_the_gate_on(much: Plane) -> None:
    said = []
    for after in range(4):
        much.kernel.meanwhile(lambda: said.append((much.cache.enforces(2), much.cache.synced() == 2)), after=after)
    much.enforce(committed(2, "10.0.0.0/24")._replace(opens=False))
    assert said == [(False, False), (False, False), (True, False), (True, False)]
    assert (much.cache.enforces(2), much.cache.enforces(1)) == (True, False)


def test_a_search_that_fails_behind_the_gate_ends_in_a_repair_without_it(much: Plane) -> None:
    much.kernel.meanwhile(lambda: much.kernel.unreadable(errno.EIO), after=1)
    much.enforce(committed(2, "10.0.0.0/24")._replace(opens=False))
    assert (much.cached(), much.reconciler.repairs, much.cache.synced()) == ({}, 1, 2)
    assert not is_gated(much.kernel.tables, LINK)
    assert not much.kernel.tables[TABLE].sets["enforced"].elements


@pytest.mark.parametrize("size", [0, 8_193], ids=["small", "large"])
def test_a_gate_that_a_failed_change_has_left_stays_until_everything_is_forgotten(much: Plane, size: int) -> None:
    """Another change comes before the repair succeeds. It must not let the sources of the first change pass."""
    much.kernel.meanwhile(lambda: much.kernel.unreadable(errno.EIO), after=1)
    much.kernel.refuse(errno.ENOMEM, after=2)
    much.enforce(committed(2, "10.0.0.0/24")._replace(opens=False))
    assert (bool(much.sync.broken), stale(much.kernel.tables, {HOST})) == (True, {HOST})
    assert is_gated(much.kernel.tables, LINK)
    much.cache.sizes["allow4"] = size
    much.kernel.history.clear()
    much.enforce(committed(3, "10.9.9.0/24")._replace(opens=False))
    much.check()
    assert all(is_gated(tables, LINK) for tables in much.kernel.history if stale(tables, {HOST}))
    assert (is_gated(much.kernel.tables, LINK), much.sync.broken) == (False, "")
    assert (much.cache.synced(), stale(much.kernel.tables, {HOST})) == (3, set())


# --- a start ---


@pytest.mark.parametrize(
    ("synced", "kept", "said"), [(1, True, False), (9, False, True)], ids=["in sync", "another generation"]
)
def test_a_start_keeps_what_agrees_with_the_table_and_forgets_the_rest(
    plane: Plane, synced: int, kept: bool, said: bool
) -> None:
    again = Plane(plane.kernel, generation=1 if kept else synced)
    assert again.start() is said
    assert set(again.cached()) == (set(ALL) if kept else set())
    assert again.cache.synced() == again.generation
    assert again.cache.epoch() == again.generation


@pytest.mark.parametrize("how", ["flush set inet portward synced", "delete table inet portward", ""])
def test_a_start_that_does_not_know_what_is_cached_forgets_everything(plane: Plane, how: str) -> None:
    if how:
        plane.kernel.load(how)
    else:
        plane.kernel.tables.clear()
    again = Plane(plane.kernel)
    again.start()
    assert not again.cached()
    assert again.cache.synced() == 1


def test_a_start_that_is_refused_leaves_the_kernel_as_it_was(kernel: FakeKernel) -> None:
    kernel.refuse(errno.ENOMEM)
    with pytest.raises(Exception, match="Cannot allocate memory"):
        Plane(kernel).start()
    assert not kernel.tables


def test_a_start_that_is_refused_keeps_an_older_ruleset(plane: Plane) -> None:
    plane.kernel.refuse(errno.ENOMEM)
    with pytest.raises(Exception, match="Cannot allocate memory"):
        Plane(plane.kernel).start()
    assert classifies(plane.kernel.tables)


# --- refusals ---


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EPERM, errno.ENOENT], ids=errno.errorcode.get)
def test_whichever_transaction_is_refused_nothing_stale_is_left(
    plane: Plane, kind: str, step: int, number: int, opens: bool
) -> None:
    reached, change = CHANGES[kind]
    plane.kernel.refuse(number, after=step)
    plane.enforce(change(2)._replace(opens=opens))
    assert not stale(plane.kernel.tables, reached)
    assert not is_gated(plane.kernel.tables, LINK)
    assert (plane.cache.epoch(), plane.cache.synced()) == (2, 2)
    assert (plane.sync.broken, plane.sync.generation) == ("", 2)
    assert plane.check()


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("after", [0, 2], ids=["at once", "after the gate"])
def test_while_the_kernel_refuses_everything_it_is_said_and_tried_until_it_works(
    plane: Plane, kind: str, after: int, opens: bool
) -> None:
    reached, change = CHANGES[kind]
    plane.kernel.refuse(errno.ENOMEM, after=after, times=20)
    plane.enforce(change(2)._replace(opens=opens))
    if not plane.sync.broken:
        assert len(plane.kernel.journal) == after, "there were no more transactions"
        return
    assert "Cannot allocate memory" in plane.sync.broken
    assert plane.sync.generation == 1, "the kernel is behind, and that is known"
    tries = 0
    while not plane.check():
        tries += 1
        assert tries <= 20
        if not plane.sync.broken:
            break
    assert not stale(plane.kernel.tables, reached)
    assert (plane.cache.synced(), plane.sync.generation, plane.sync.broken) == (2, 2, "")
    assert not is_gated(plane.kernel.tables, LINK)
    assert plane.check()


def test_a_reading_that_fails_ends_in_everything_forgotten(plane: Plane) -> None:
    plane.kernel.unreadable(errno.EINTR, 2)  # of the epoch before, and of the first set
    plane.enforce(committed(2, "10.0.0.0/24"))
    assert not plane.cached()
    assert plane.cache.synced() == 2


def test_without_the_privilege_any_more_it_is_said(plane: Plane) -> None:
    plane.kernel.permitted = False
    plane.enforce(committed(2, "10.0.0.4/32"))
    assert "not permitted" in plane.sync.broken
    plane.kernel.permitted = True
    plane.check()
    assert (plane.sync.broken, plane.cached(), plane.cache.synced()) == ("", {}, 2)


# --- full sets, and elements that go by themselves ---


def fill(plane: Plane, *names: str) -> None:
    """Leaves no room in these sets."""
    for name in names:
        found = plane.kernel.tables[TABLE].sets[name]
        found.size = max(1, len(found.elements))
        if not found.elements:
            plane.kernel.learn(name, source("192.0.2.1").key)


@pytest.mark.parametrize("kind", CHANGES)
def test_full_sets_lose_what_a_change_reaches(plane: Plane, kind: str) -> None:
    reached, change = CHANGES[kind]
    plane.learn(Class.ALLOW, OTHER, HOST)
    fill(plane, "allow4", "deny4")
    plane.enforce(change(2))
    assert not stale(plane.kernel.tables, reached)
    assert stale(plane.kernel.tables, set(ALL)) == set(ALL) - reached, "the others keep their verdicts"
    assert plane.cache.synced() == 2


def test_an_element_that_vanishes_between_reading_and_deleting_is_no_harm(plane: Plane) -> None:
    fill(plane, "deny4")
    allow = plane.kernel.tables[TABLE].sets["allow4"].elements
    assert HOST.key in allow

    def vanish() -> None:
        plane.kernel.tables[TABLE].sets["allow4"].elements.pop(HOST.key, None)

    # The epoch, the attempt by `Add`, and then the deletion of what was read.
    plane.kernel.meanwhile(vanish, after=2)
    plane.enforce(committed(2, "10.0.0.4/32", "10.9.9.9/32"))
    assert set(plane.cached()) - {source("192.0.2.1")} == {HOST6, ELSEWHERE}
    assert (plane.cache.synced(), plane.reconciler.repairs) == (2, 0)


@pytest.mark.parametrize("network", ["10.0.0.0/24", "10.9.9.9/32"])
def test_elements_that_expire_at_any_moment_are_no_harm(plane: Plane, network: str) -> None:
    for after in range(3):
        plane.kernel.meanwhile(lambda: setattr(plane.kernel, "now", plane.kernel.now + 61), after=after)
    plane.enforce(committed(2, network))
    assert not plane.elements.rows("allow4")
    assert (plane.cache.synced(), plane.reconciler.repairs) == (2, 0)


def test_a_reading_that_misses_elements_is_followed_by_another(plane: Plane) -> None:
    crowd = [source(f"10.0.1.{n}") for n in range(200)]
    plane.learn(Class.ALLOW, *crowd)
    plane.kernel.overlook("allow4", [HOST.key, *(one.key for one in crowd[:50])])
    plane.enforce(committed(2, "10.0.0.0/16"))
    assert set(plane.cached()) == {HOST6, OTHER, ELSEWHERE}


# --- workers and other programs in between ---


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("moment", range(5))
def test_a_verdict_of_the_older_policy_that_comes_in_between_is_not_left(
    plane: Plane, kind: str, moment: int, opens: bool
) -> None:
    """A worker gave its verdict before the change, and its packet comes back between the transactions."""
    reached, change = CHANGES[kind]
    plane.kernel.meanwhile(lambda: plane.learn(Class.ALLOW, *reached, generation=1), after=moment)
    plane.enforce(change(2)._replace(opens=opens))
    plane.learn(Class.ALLOW, *reached, generation=1)
    assert not stale(plane.kernel.tables, reached)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize(
    "text", ["flush ruleset", "delete table inet portward", "flush chain inet portward screen"]
)
def test_what_another_program_takes_away_in_between_is_put_back(
    plane: Plane, kind: str, moment: int, text: str, opens: bool
) -> None:
    reached, change = CHANGES[kind]
    plane.kernel.meanwhile(lambda: plane.kernel.load(text), after=moment)
    plane.enforce(change(2)._replace(opens=opens))
    plane.check()
    assert classifies(plane.kernel.tables)
    assert not stale(plane.kernel.tables, reached)
    assert (plane.cache.synced(), plane.sync.broken) == (2, "")
    assert plane.check()


# --- the process dies ---


def _enforces(plane: Plane, change: Committed) -> None:
    plane.enforce(change)


def _enforces_on_full_sets(plane: Plane, change: Committed) -> None:
    fill(plane, "allow4", "deny4", "allow6")
    plane.enforce(change)


def _repairs(plane: Plane, change: Committed) -> None:
    plane.kernel.load("flush chain inet portward screen")
    plane.generation = change.generation
    plane.check()


def _starts(plane: Plane, change: Committed) -> None:
    Plane(plane.kernel, generation=change.generation).start()


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("work", [_enforces, _enforces_on_full_sets, _repairs, _starts])
@pytest.mark.parametrize("dies", range(1, 9))
def test_after_whichever_transaction_the_process_dies_the_next_start_leaves_nothing_stale(
    plane: Plane, kind: str, work: Callable[[Plane, Committed], Any], dies: int, opens: bool
) -> None:
    """The policy table has the new generation when the work begins. At each moment the ruleset is loaded. Once the
    epoch has moved, no verdict of the older policy is cached. While a stale verdict is cached, `synced` is not the
    new generation, and `enforced` is only if the gate keeps stale verdicts from acting."""
    reached, change = CHANGES[kind]
    plane.kernel.die(dies + (work is _repairs))  # another program's transaction comes first there
    try:
        work(plane, change(2)._replace(opens=opens))
    except ProcessDied:
        pass
    else:
        assert not stale(plane.kernel.tables, reached)
        plane.kernel.die(None)
    again = Plane(plane.kernel, generation=2)
    if plane.cache.epoch() == 2:
        assert not plane.learn(Class.ALLOW, *reached, generation=1)
    again.start()
    in_force = False
    for tables in plane.kernel.history[work is _repairs :]:
        assert classifies(tables)
        said = [name for name in ("synced", "enforced") if NEW in tables[TABLE].sets[name].elements]
        in_force |= "enforced" in said
        if left := stale(tables, reached):
            assert "synced" not in said
            assert not in_force or all(is_gated(tables, one.link) for one in left), "not even during a reload"
            assert not said or all(is_gated(tables, one.link) for one in left)
    assert classifies(plane.kernel.tables)
    assert not stale(plane.kernel.tables, reached)
    assert not is_gated(plane.kernel.tables, LINK)
    assert (again.cache.epoch(), again.cache.synced()) == (2, 2)
    assert again.check()


# --- changes that were lost on their way ---


def test_a_change_behind_one_that_was_lost_forgets_everything(plane: Plane) -> None:
    """It is unknown which sources the lost change affects, and `synced` must not claim that no older verdict is
    cached."""
    plane.enforce(committed(3, "10.0.0.4"))
    assert plane.cached() == {}
    assert plane.cache.synced() == 3


def test_changes_carried_out_together_forget_only_what_they_reach(plane: Plane) -> None:
    plane.enforce(merged([committed(2, "10.0.0.4"), committed(3, "2001:db8::/64")]))
    assert set(plane.cached()) == {OTHER, ELSEWHERE}
    assert plane.cache.synced() == 3


def test_a_change_while_the_ruleset_is_broken_says_nothing_of_the_one_before(plane: Plane) -> None:
    plane.kernel.refuse(errno.ENOMEM, times=3)
    plane.enforce(committed(2, "10.9.9.9"))
    assert plane.sync.broken
    plane.enforce(committed(3, "10.0.0.4"))
    assert plane.sync.broken or plane.cached() == {}
    plane.check()
    assert not plane.sync.broken
    assert plane.cached() == {}
    assert plane.cache.synced() == 3


@pytest.mark.parametrize("generation", [6, 7])
def test_a_start_that_died_before_it_forgot_is_not_taken_for_one_that_is_in_step(
    plane: Plane, generation: int
) -> None:
    """`synced` must not be the loaded generation or one near it, because the table may have reached that one, or a
    verb may wait for it."""
    state = ruleset.State(generation, synced=False)
    plane.reconciler.load(
        ruleset.wanted(templates.read(), plane.config, PRESET, native=plane.kernel.native, state=state)
    )
    synced = plane.cache.synced()
    assert synced is not None
    assert abs(synced - generation) == 2**31
