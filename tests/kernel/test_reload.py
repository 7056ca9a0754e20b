"""A configuration that is taken while the gateway enforces, and what holds where that fails half-way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import UTC, date, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from kernel.conftest import lab_name
from portward.config import Config
from portward.core import Core
from portward.errors import KernelError
from portward.gateway import mark, ruleset, xtables
from portward.gateway.keeper import closed, loaded
from portward.gateway.links import Links
from portward.gateway.nft import Nft
from portward.gateway.surroundings import NOTHING
from portward.lab import namespaces
from portward.lab.topology import CONTOSO, Lab
from portward.model import Attachment, Subscription
from portward.policy import preset as presets
from portward.resources import rules
from portward.store.protocol import Put, encode, key_of
from portward.store.sqlite import SqliteStore
from portward.table.database import TableError

_OWNER = UUID("11111111-0000-4000-8000-000000000001")


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """The steps of a gateway that enforces, with one source that azure-2020 lets through and aws does not."""
    store = SqliteStore(tmp_path / "portward.db", create=True)
    records = (
        Subscription(id=_OWNER, offer="enterprise-agreement", created=date(2022, 6, 30)),
        Attachment(segment=CONTOSO.segment, address=ip_network("10.0.0.4"), subscription=_OWNER),
    )
    batch = [Put(key_of(record), encode(record)) for record in records]
    store.write(batch, expected=0, actor="test", at=datetime.now(UTC))
    store.close()
    config = Config(
        segments=("vni*",), uplinks=("up0",), store=f"sqlite:{tmp_path}/portward.db", table=tmp_path / "table"
    )
    with Lab(lab_name(), (CONTOSO,)) as lab, namespaces.inside(lab.gateway):
        core = Core(config, presets.load("azure-2020"))
        try:
            core.first_policy()
            core.first_links(Links({socket.if_nametoindex(CONTOSO.segment): CONTOSO.segment}, frozenset()))
            core.load()
            yield core
        finally:
            core.close()


def test_the_base_chains_stand_where_the_code_expects_those_of_the_file(core: Core) -> None:
    """Others would be made anew at each load, and what waits in queues be dropped."""
    always = {name: at for name, at in ruleset._HOOKS.items() if name != "stacked"}
    assert core._netlink.hooks(ruleset.TABLE) == always
    for _ in range(2):
        core.surround(NOTHING._replace(stacked=frozenset((1,))))
        assert core._netlink.hooks(ruleset.TABLE) == ruleset._HOOKS
        assert core.keeper.intact()
        core.surround(NOTHING)
        assert core._netlink.hooks(ruleset.TABLE) == always
        assert core.keeper.intact()
    assert core.keeper.repairs == 0


def test_chains_that_act_at_once_are_there_while_the_whole_ruleset_is_not_taken(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device above a segment is closed first; what fails after that is tried again."""
    monkeypatch.setattr(core.keeper, "_load_once", once(KernelError("busy"), core.keeper._load_once))
    monkeypatch.setattr(core, "_enforcement", Refusing())
    core.surround(NOTHING._replace(stacked=frozenset((1,))))
    assert core._netlink.hooks(ruleset.TABLE) == ruleset._HOOKS


class Refusing:
    """What cannot repair anything."""

    def repair(self, _: int) -> None:
        """Does nothing."""


def in_step(core: Core) -> bool:
    """Whether the kernel remembers verdicts of the table's policy, and of no other."""
    learned = core._learned
    return learned.epoch() == mark.epoch_of(core.generation) and learned.synced() == core.generation


def once(error: Exception, real: Any) -> Any:
    """What fails the first time that it is called."""
    calls = iter([error])

    def fails(*arguments: Any, **options: Any) -> Any:
        for failure in calls:
            raise failure
        return real(*arguments, **options)

    return fails


def test_a_table_that_cannot_be_written_half_way_leaves_no_old_verdict_in_force(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_step(core)
    monkeypatch.setattr(core._writer, "put_links", once(TableError("disk full"), core._writer.put_links))
    core.reload(core.config, presets.load("aws"))
    assert core.preset.name == "aws"
    assert in_step(core)
    assert not core.at_rest(), "the interfaces are to be written yet"
    core.check()
    assert core.at_rest()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_kernel_that_refuses_half_way_is_asked_again(
    core: Core, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    real = xtables.install if not core.native else core._nft.load
    failing = real
    for _ in range(failures):
        failing = once(KernelError("no memory"), failing)
    if core.native:
        monkeypatch.setattr(core._nft, "load", failing)
    else:
        monkeypatch.setattr(xtables, "install", failing)
    core.reload(core.config, presets.load("aws"))
    if failures > 1:  # repairing has failed as well
        assert core.broken
        assert not core.at_rest()
        core.check()
    assert not core.broken
    assert in_step(core)


def test_half_a_ruleset_stays_where_somebody_took_the_whole_away(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its queue statements it drops what the kernel does not remember; without it port 25 is open."""
    want = core._want()
    if want.native:  # as on a kernel that has to be told in a second transaction
        want = want._replace(native=False)
    core._nft.load("delete table inet portward\n")
    monkeypatch.setattr(xtables, "install", once(KernelError("no memory"), xtables.install))
    with pytest.raises(KernelError):
        core.keeper.repair(want)
    assert loaded(core._netlink)
    core.check()
    assert not core.broken


@pytest.mark.parametrize("before", ["delete table inet portward\n", ""], ids=["no-ruleset", "beside-the-ruleset"])
def test_a_port_that_was_closed_meanwhile_is_opened_again(core: Core, before: str) -> None:
    """In one transaction of somebody else's, as nftables.service does it: with a `flush ruleset` or without."""
    Nft().load(before + rules("nftables", "closed.nft").read_text())
    core.check()
    assert not core.broken
    assert loaded(core._netlink)
    assert not closed(core._netlink)


def test_a_change_that_was_not_carried_out_is_no_rest(core: Core) -> None:
    assert core.at_rest()
    core._writer.preset = presets.load("aws")
    core._writer.settle(now=datetime.now(UTC))
    assert not core.at_rest()
    core.check()
    assert in_step(core)
