"""The table with an owner: no other program changes it, and every way from one kind of table to the other leaves
port 25 closed."""

from __future__ import annotations

import contextlib
import errno
from itertools import pairwise
from typing import cast

import pytest
from msgspec.structs import replace

from portward.config.keys import Config, Owned, Ruleset
from portward.dataplane.fake import FakeKernel, FakeNetlink, ProcessDied
from portward.dataplane.faketables import FakeTable
from portward.dataplane.names import STACKED_HOOKS, TABLE
from portward.dataplane.reconciler import CLOSED, begin
from portward.errors import KernelError
from portward.ipc.mark import Class
from unit.dataplane.grounds import CONFIG, Plane, source, words

HOST = source("10.0.0.4")
NEVER = replace(CONFIG, ruleset=Ruleset(owned=Owned.NEVER))
OWNED = "owner,persist"


def owning(kernel: FakeKernel, config: Config = CONFIG, inherited: FakeNetlink | None = None) -> Plane:
    """A gateway on a host whose tables can have an owner. `inherited`: its socket is that of another process."""
    netlink = kernel.netlink(inherited)
    nft = kernel.nft(netlink, compiles=True)
    nft.ownable = True
    return Plane(kernel, config=config, netlink=netlink, nft=nft)


def table(kernel: FakeKernel) -> FakeTable:
    """portward's table."""
    return kernel.tables[TABLE]


@pytest.fixture
def kernel() -> FakeKernel:
    """A kernel without any table."""
    return FakeKernel()


@pytest.fixture
def plane(kernel: FakeKernel) -> Plane:
    """A gateway that enforces by a table with an owner."""
    found = owning(kernel)
    found.start()
    return found


def test_the_socket_that_loads_the_ruleset_owns_it(plane: Plane) -> None:
    assert (table(plane.kernel).flags, table(plane.kernel).owner) == (OWNED, plane.netlink.port)
    assert plane.nft.owns
    assert plane.netlink.state("portward_closed") is None


@pytest.mark.parametrize("config", [CONFIG, NEVER])
def test_the_table_is_a_plain_one_if_the_host_or_the_configuration_wants_it(
    kernel: FakeKernel, config: Config
) -> None:
    found = owning(kernel, config)
    found.nft.ownable = config is NEVER
    found.start()
    assert (table(kernel).flags, table(kernel).owner) == ("", None)
    assert not found.nft.owns


FOREIGN = (
    "delete table inet portward",
    "flush table inet portward",
    "delete chain inet portward screen",
    "flush chain inet portward screen",
    "insert rule inet portward screen accept",
    "flush set inet portward deny4",
    "add element inet portward epoch { 0x80 }",
    "add chain inet portward theirs",
    "table inet portward { flags dormant; }",
    "table inet portward { }",
)


@pytest.mark.parametrize("command", FOREIGN)
def test_no_other_program_changes_it(plane: Plane, command: str) -> None:
    before = plane.kernel.state()
    with pytest.raises(KernelError, match="Operation not permitted"):
        plane.kernel.load(command)
    assert plane.kernel.state() == before


def test_a_flush_of_all_rulesets_leaves_it_and_what_is_cached(plane: Plane) -> None:
    plane.learn(Class.ALLOW, HOST)
    plane.kernel.load("table inet theirs { }")
    plane.kernel.load("flush ruleset")
    assert set(plane.kernel.tables) == {TABLE}
    assert plane.check()
    assert (set(plane.cached()), plane.reconciler.repairs) == ({HOST}, 0)


def test_what_the_agent_writes_later_goes_through_the_same_socket(plane: Plane) -> None:
    """A change of the policy, a chain that is added alone, and a whole ruleset."""
    plane.surroundings = plane.surroundings._replace(stacked=frozenset((7,)))
    assert plane.check()
    assert STACKED_HOOKS.keys() <= plane.netlink.hooks(TABLE).keys()
    assert table(plane.kernel).flags == OWNED


# --- from one kind of table to the other ---


def closed_while_it_changes(kernel: FakeKernel) -> bool:
    """Whether CLOSED was loaded before and after each transaction that changed the kind of the table."""
    changes = [
        (before, after)
        for before, after in pairwise(kernel.history)
        if TABLE in before and TABLE in after and before[TABLE].persists != after[TABLE].persists
    ]
    assert changes, "there was a change"
    return all(CLOSED in before and CLOSED in after for before, after in changes)


def enforces(kernel: FakeKernel) -> bool:
    """Whether a source that may not send is stopped."""
    return CLOSED in kernel.tables or bool(TABLE in kernel.tables and table(kernel).chains["screen"].rules)


def test_a_plain_table_becomes_one_with_an_owner_in_one_transaction_while_the_port_is_closed(
    kernel: FakeKernel,
) -> None:
    """A packet that meets both tables may pass both, so the forward hook stops it. Cached verdicts go."""
    first = Plane(kernel)
    first.start()
    first.learn(Class.ALLOW, HOST)
    kernel.journal.clear()
    second = owning(kernel)
    second.start()
    done = words(kernel.journal)
    assert [one for one in done if "ruleset" in one] == ["load the ruleset"]
    assert table(kernel).flags == OWNED
    assert closed_while_it_changes(kernel)
    assert CLOSED not in kernel.tables
    assert not second.cached()
    assert any(one.startswith("flush") for one in done[: done.index("load the ruleset")]), "it is counted first"
    assert second.check()


@pytest.mark.parametrize("inherited", [True, False], ids=["its owner", "none"])
def test_a_table_with_an_owner_becomes_a_plain_one_if_the_configuration_wants_it(
    plane: Plane, inherited: bool
) -> None:
    kernel = plane.kernel
    if not inherited:
        plane.netlink.close()
        assert (table(kernel).flags, table(kernel).owner) == ("persist", None)
    again = owning(kernel, NEVER, cast("FakeNetlink", plane.netlink) if inherited else None)
    again.start()
    assert (table(kernel).flags, table(kernel).owner) == ("", None)
    assert closed_while_it_changes(kernel)
    assert CLOSED not in kernel.tables
    assert not again.nft.owns


def test_a_reload_changes_the_kind_of_the_table_in_both_directions(plane: Plane) -> None:
    for config, flags in ((NEVER, ""), (CONFIG, OWNED), (NEVER, "")):
        plane.config = config
        assert plane.check()
        assert table(plane.kernel).flags == flags
        assert plane.nft.owns is (flags == OWNED)
    assert closed_while_it_changes(plane.kernel)
    assert plane.reconciler.repairs == 0


@pytest.mark.parametrize("after", range(1, 12))
def test_a_process_that_dies_on_the_way_leaves_the_port_closed_and_the_next_one_ends_it(
    kernel: FakeKernel, after: int
) -> None:
    Plane(kernel).start()
    second = owning(kernel)
    kernel.die(after)
    try:
        second.start()
    except ProcessDied:
        second.netlink.close()
    kernel.die(None)
    assert enforces(kernel)
    before = cast("FakeNetlink", second.netlink)
    third = owning(kernel, inherited=None if before._closed else before)
    third.start()
    assert (table(kernel).flags, CLOSED in kernel.tables) == (OWNED, False)


@pytest.mark.parametrize("refused", range(8))
def test_whatever_the_kernel_refuses_on_the_way_the_port_stays_closed(kernel: FakeKernel, refused: int) -> None:
    Plane(kernel).start()
    second = owning(kernel)
    kernel.refuse(errno.ENOMEM, after=refused)
    with contextlib.suppress(KernelError):
        second.start()
    assert enforces(kernel)
    assert all(TABLE in state for state in kernel.history)


def test_if_the_kernel_takes_no_other_kind_of_table_the_one_before_goes_on_alone(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources that may send can send, as before."""
    Plane(kernel).start()
    second = owning(kernel)

    def refused(*_: object) -> None:
        assert CLOSED in kernel.tables
        raise KernelError("no memory")

    monkeypatch.setattr(second.nft, "replace", refused)
    with pytest.raises(KernelError, match="no memory"):
        second.start()
    assert CLOSED not in kernel.tables
    assert table(kernel).flags == ""
    assert enforces(kernel)


# --- the next agent ---


def test_a_table_without_its_owner_is_adopted_with_all_that_is_cached(plane: Plane) -> None:
    plane.learn(Class.ALLOW, HOST)
    plane.netlink.close()
    plane.kernel.journal.clear()
    again = owning(plane.kernel)
    again.start()
    assert (table(plane.kernel).flags, table(plane.kernel).owner) == (OWNED, again.netlink.port)
    assert set(again.cached()) == {HOST}
    assert not any(CLOSED in state for state in plane.kernel.history)


def test_an_agent_with_the_same_socket_goes_on_as_the_owner(plane: Plane) -> None:
    plane.learn(Class.ALLOW, HOST)
    again = owning(plane.kernel, inherited=cast("FakeNetlink", plane.netlink))
    plane.netlink.close()
    again.start()
    assert (table(plane.kernel).flags, table(plane.kernel).owner) == (OWNED, again.netlink.port)
    assert set(again.cached()) == {HOST}


def test_an_agent_with_another_socket_changes_nothing_while_there_is_an_owner(plane: Plane) -> None:
    before = plane.kernel.state()
    for agent in (owning(plane.kernel), Plane(plane.kernel)):
        with pytest.raises(KernelError, match="Operation not permitted"):
            agent.start()
        assert plane.kernel.state() == before


def test_the_baseline_leaves_a_table_that_waits_for_the_agent(kernel: FakeKernel) -> None:
    boot = owning(kernel)
    begin(boot.nft, boot.want(0))
    boot.netlink.close()
    assert (table(kernel).flags, table(kernel).owner) == ("persist", None)
    owning(kernel).start()
    assert table(kernel).flags == OWNED
    assert not any(CLOSED in state for state in kernel.history)
