"""The steps of a gateway whose table has an owner, on a fake kernel with fake custodians."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from portward import __version__
from portward.config.keys import Owned, Ruleset
from portward.daemon import core as module
from portward.dataplane import tableowner
from portward.dataplane.fake import FakeKernel, FakeNetlink
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.names import TABLE
from portward.dataplane.tableowner import CustodianError, Ownership, TableOwner
from portward.errors import KernelError
from portward.ipc import custody
from portward.policy import presets
from unit.daemon.test_core import ALLOWED, Ground


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    """A gateway that is not started."""
    found = Ground(tmp_path, monkeypatch)
    yield found
    found.core.close()


class Custodians:
    """The custodians of a fake kernel: each has a descriptor of the owner's socket."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self.alive: dict[int, Custodian] = {}

    def start(self, owner: TableOwner) -> Custodian:
        """Stands in for `TableOwner._started`."""
        custodian = Custodian(self, self._kernel.netlink(cast("FakeNetlink", owner.netlink)))
        self.alive[custodian.held.port] = custodian
        return custodian

    def take(self, port: int) -> tuple[FakeNetlink, None, Custodian]:
        """Stands in for `_taken`."""
        return self.alive[port].held, None, self.alive[port]


class Custodian:
    """A custodian that has not ended."""

    pid, release = 4711, __version__

    def __init__(self, custodians: Custodians, held: FakeNetlink) -> None:
        self._custodians, self.held = custodians, held
        self.connection = io.BytesIO()
        self.heard: list[bytes] = []

    def send(self, word: bytes) -> None:
        """Notes the command."""
        self.heard.append(word)

    def has_ended(self) -> bool:
        """No."""
        return False

    def end(self) -> None:
        """Closes the descriptor."""
        del self._custodians.alive[self.held.port]
        self.held.close()


@pytest.fixture
def custodians(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> Custodians:
    """A host whose tables can have an owner, and whose agent has not started yet."""
    found = Custodians(ground.kernel)
    monkeypatch.setattr(module, "Nft", lambda socket: ground.kernel.nft(socket, compiles=True))
    monkeypatch.setattr(module, "hearing", lambda _: SimpleNamespace(read=RulesetChanges, close=lambda: None))
    monkeypatch.setattr(TableOwner, "_started", lambda owner: found.start(owner))  # noqa: PLW0108 # binds owner
    monkeypatch.setattr(tableowner, "_taken", found.take)
    monkeypatch.setattr(tableowner, "_connected", lambda _: None)
    ground.core.close()
    ground.core = ground.made()
    return found


def owned(ground: Ground) -> Ownership:
    """Whether the table has an owner, by the agent."""
    return ground.core.ownership


def reload_owned(ground: Ground, owned: Owned) -> None:
    """A reload with another `[ruleset] owned`."""
    ground.config = msgspec.structs.replace(ground.config, ruleset=Ruleset(owned=owned))
    ground.core.expect_owner(ground.config)
    ground.core.intake.reload(ground.config, presets.load("azure-2020"))
    ground.core.settle_owner()


def test_the_agent_owns_its_table_and_a_custodian_stays(ground: Ground, custodians: Custodians) -> None:
    ground.start()
    owner = ground.kernel.tables[TABLE].owner
    assert owned(ground) == (True, 4711, "")
    assert custodians.alive[cast("int", owner)].heard == [custody.KEEP]
    ground.core.close()
    assert ground.kernel.tables[TABLE].owner == owner, "the custodian has the socket"


def test_the_next_agent_goes_on_with_the_same_socket(ground: Ground, custodians: Custodians) -> None:
    ground.start()
    owner = ground.kernel.tables[TABLE].owner
    ground.learn(ALLOWED)
    ground.restart()
    assert ground.kernel.tables[TABLE].owner == owner
    assert ground.core.own_ports() == (owner,)
    assert ground.cache.get(ALLOWED) is not None
    assert len(custodians.alive) == 1


@pytest.mark.parametrize("owned", [Owned.AUTO, Owned.NEVER])
def test_a_start_that_the_kernel_refuses_leaves_no_custodian_that_stays(
    ground: Ground, custodians: Custodians, owned: Owned
) -> None:
    ground.config = msgspec.structs.replace(ground.config, ruleset=Ruleset(owned=owned))
    ground.core.close()
    ground.core = ground.made()
    ground.kernel.refuse(errno.ENOMEM, times=9)
    with pytest.raises(KernelError):
        ground.start()
    assert [custodian.heard for custodian in custodians.alive.values()] == ([[]] if owned is Owned.AUTO else [])


def test_a_reload_makes_the_table_a_plain_one_and_ends_the_custodian_and_the_other_way_round(
    ground: Ground, custodians: Custodians
) -> None:
    ground.start()
    reload_owned(ground, Owned.NEVER)
    assert owned(ground) == (False, None, '[ruleset] owned = "never"')
    assert (ground.kernel.tables[TABLE].flags, custodians.alive) == ("", {})
    reload_owned(ground, Owned.AUTO)
    assert owned(ground) == (True, 4711, "")
    assert len(custodians.alive) == 1


def test_if_the_host_cannot_have_such_tables_any_more_the_next_agent_lets_it_go(
    ground: Ground, custodians: Custodians, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, an older nft was installed."""
    ground.start()
    monkeypatch.setattr(tableowner, "_old_nft", lambda: "nft is of version 1.0")
    ground.restart()
    assert owned(ground) == (False, None, "nft is of version 1.0")
    assert (ground.kernel.tables[TABLE].flags, custodians.alive) == ("", {})
    assert not ground.core.dataplane.broken


def test_a_custodian_that_cannot_be_started_keeps_no_gateway_from_enforcing(
    ground: Ground, custodians: Custodians, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: TableOwner) -> None:
        raise CustodianError("no process")

    monkeypatch.setattr(TableOwner, "_started", refused)
    ground.start()
    assert owned(ground) == (True, None, "")
    assert "the owner of the table: no process" in caplog.text
    assert not custodians.alive


def test_the_custodian_is_there_before_the_table_has_an_owner(
    ground: Ground, custodians: Custodians, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the agent is killed right after the load, there is one all the same."""
    seen = []
    load = ground.core.dataplane.load

    def loading(*arguments: object) -> None:
        seen.append(len(custodians.alive))
        load(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ground.core.dataplane, "load", loading)
    ground.start()
    assert seen == [1]
