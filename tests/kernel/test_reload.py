"""A reload of the configuration while the gateway enforces, and what still holds if it fails half-way."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, date, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from kernel.conftest import lab_name
from portward.base.resources import rules
from portward.config.keys import Config
from portward.daemon.core import Core
from portward.daemon.intake import OnKernel, at_once
from portward.dataplane import xtables
from portward.dataplane.elements import Add
from portward.dataplane.links import Device, Links
from portward.dataplane.names import GUARD_HOOKS, HOOKS, RENEWED, STACKED_HOOKS, TABLE, TUNNELS_HOOKS
from portward.dataplane.nfnetlink import KernelElements
from portward.dataplane.nft import Nft
from portward.dataplane.reconciler import closed, loaded
from portward.dataplane.verdict_cache import Source
from portward.errors import KernelError
from portward.ipc import mark
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, Lab
from portward.model import Attachment, Standing, Subscription
from portward.policy import presets
from portward.store.codec import encode, key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from portward.table.database import TableError

_OWNER = UUID("11111111-0000-4000-8000-000000000001")


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """The agent's `Core` in a gateway that enforces. Its one source is allowed by preset azure-2020 and denied by
    aws."""
    with enforcing(tmp_path) as core:
        yield core


@contextmanager
def enforcing(tmp_path: Path, on_kernel: OnKernel = at_once, lab: Lab | None = None) -> Iterator[Core]:
    """The same; `on_kernel` runs the changes of the kernel, and `lab` is the gateway's lab."""
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
    with lab or Lab(lab_name(), (CONTOSO,)) as place, namespaces.inside(place.gateway):
        core = Core(config, presets.load("azure-2020"), on_kernel)
        try:
            core.intake.first_policy()
            core.first_links(Links({socket.if_nametoindex(CONTOSO.segment): CONTOSO.segment}, frozenset()))
            core.load()
            yield core
        finally:
            core.close()


def test_the_base_chains_stand_where_the_code_expects_those_of_the_file(core: Core) -> None:
    """A base chain that stands elsewhere would be made anew at each load, and packets that wait in its queue would
    be dropped."""
    in_order = [*HOOKS.items()]
    # The lab translates addresses, so the guard is loaded.
    always = {*in_order, *TUNNELS_HOOKS.items(), *GUARD_HOOKS.items()}

    def found() -> list[tuple[str, tuple[int, int]]]:
        return list(core._netlink.hooks(TABLE).items())

    assert found()[:2] == in_order
    assert set(found()) == always
    now = core.dataplane._desired.surroundings
    for _ in range(2):
        core.dataplane.surround(now._replace(stacked=frozenset((1,))))
        assert found()[:2] == in_order
        assert set(found()) == always | STACKED_HOOKS.items()
        assert core.dataplane.inet.reconciler.intact()
        core.dataplane.surround(now)
        assert found()[:2] == in_order
        assert set(found()) == always
        assert core.dataplane.inet.reconciler.intact()
    assert core.dataplane.inet.reconciler.repairs == 0


def test_chains_that_act_at_once_are_there_while_the_whole_ruleset_is_not_taken(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent first closes a device above a segment. If a later step fails it tries again."""
    reconciler = core.dataplane.inet.reconciler
    monkeypatch.setattr(reconciler, "_load_once", once(KernelError("busy"), reconciler._load_once))
    monkeypatch.setattr(core.dataplane.inet.sync, "_repair", lambda _: None)
    core.dataplane.surround(core.dataplane._desired.surroundings._replace(stacked=frozenset((1,))))
    assert core._netlink.hooks(TABLE)["stacked"] == STACKED_HOOKS["stacked"]


_VRF = 900


@pytest.mark.parametrize("number", [1, 2])
def test_what_came_through_a_vrf_is_its_ports_if_there_is_one(core: Core, number: int) -> None:
    """In hook forward, where the guard queues packets, a packet's interface is the VRF and not its port."""
    port = socket.if_nametoindex(CONTOSO.segment)
    devices = (
        Device(_VRF, "vrf", "vrf"),
        Device(port, CONTOSO.segment, master=_VRF),
        Device(901, "vni9", master=_VRF if number == 2 else 0),
    )
    links = Links({device.ifindex: device.name for device in devices}, frozenset(), devices)
    core.dataplane.links_seen(links)
    core.intake.links_changed(links)
    address = ip_address("10.0.0.4").packed
    assert (core.dataplane._reader.lookup(_VRF, address) is not None) is (number == 1)
    core.dataplane.install_limits([Source(_VRF, address)])
    held = core.dataplane.inet.cache.get(Source(port, address))
    assert (held is not None and held.verdict is mark.Class.ALLOW) is (number == 1)
    assert core.dataplane.inet.cache.get(Source(_VRF, address)) is None, "the sets know ports"


def test_an_interface_that_changes_its_owner_again_counts_as_renewed_for_as_long_again(core: Core) -> None:
    cache = core.dataplane.inet.cache

    def left() -> int:
        """The milliseconds until the interface no longer counts as renewed."""
        ((_, _, expires_ms),) = cache._elements.rows(RENEWED)
        return expires_ms

    cache.interfaces.renew([5])
    until(lambda: left() < 9_800, "some time has passed")
    cache.interfaces.renew([5])
    assert left() > 9_800


def in_step(core: Core) -> bool:
    """Whether the kernel caches verdicts of the table's generation, and of no other."""
    cache = core.dataplane.inet.cache
    return cache.epoch() == mark.epoch_of(core.generation) and cache.synced() == core.generation


def once(error: Exception, real: Any) -> Any:
    """A function that raises `error` the first time that it is called, and then calls `real`."""
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
    core.intake.reload(core.dataplane.config, presets.load("aws"))
    assert core.dataplane.preset.name == "aws"
    assert in_step(core)
    assert core.intake.links_failed, "the interfaces are to be written yet"
    core.intake.retry_links()
    assert not core.intake.links_failed
    assert in_step(core)
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
    core.intake.reload(core.dataplane.config, presets.load("aws"))
    if failures > 1:  # repairing has failed as well
        assert core.dataplane.broken
        assert not core.at_rest()
        core.dataplane.check()
    assert not core.dataplane.broken
    assert in_step(core)


def test_half_a_ruleset_stays_if_the_whole_was_gone(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ruleset without its queue statements drops packets without a cached verdict. Without a ruleset port 25
    would be open."""
    want = core.dataplane.inet.sync.wanted(core.dataplane._desired)
    if want.native:  # as on a kernel that needs a second transaction for the queue statements
        want = want._replace(native=False)
    core._nft.load("delete table inet portward\n")
    monkeypatch.setattr(xtables, "install", once(KernelError("no memory"), xtables.install))
    with pytest.raises(KernelError):
        core.dataplane.inet.reconciler.repair(want)
    assert loaded(core._netlink)
    core.dataplane.check()
    assert not core.dataplane.broken


@pytest.mark.parametrize("before", ["delete table inet portward\n", ""], ids=["no-ruleset", "beside-the-ruleset"])
def test_a_port_that_was_closed_meanwhile_is_opened_again(core: Core, before: str) -> None:
    """Another program closes it in one transaction, as nftables.service does, with a `flush ruleset` or
    without."""
    Nft().load(before + rules("nftables", "closed.nft").read_text())
    core.dataplane.check()
    assert not core.dataplane.broken
    assert loaded(core._netlink)
    assert not closed(core._netlink)


def test_a_change_that_was_not_carried_out_is_no_rest(core: Core) -> None:
    assert core.at_rest()
    core._writer.preset = presets.load("aws")
    core._writer.decide_due(now=datetime.now(UTC))
    assert not core.at_rest()
    core.dataplane.check()
    assert in_step(core)


class Later:
    """A kernel thread that lags behind: it collects its jobs, and runs them when `catch_up` is called."""

    def __init__(self) -> None:
        self.given: list[Callable[[], object]] = []

    def __call__(self, work: Callable[[], Any]) -> Future[Any]:
        self.given.append(work)
        return Future()

    def catch_up(self) -> None:
        """Runs the collected jobs in their order."""
        while self.given:
            self.given.pop(0)()


def disable(tmp_path: Path) -> None:
    """Sets the subscription of the source to disabled in the store."""
    store = SqliteStore(tmp_path / "portward.db")
    record = Subscription(
        id=_OWNER, offer="enterprise-agreement", created=date(2022, 6, 30), standing=Standing.DISABLED
    )
    batch = [Put(key_of(record), encode(record))]
    store.write(batch, expected=store.revision(), actor="test", at=datetime.now(UTC))
    store.close()


def test_a_change_on_its_way_to_the_kernel_thread_is_no_reason_for_a_repair(tmp_path: Path) -> None:
    kernel = Later()
    with enforcing(tmp_path, kernel) as core:
        disable(tmp_path)
        assert core.intake.sync()
        assert (core.revision, core.dataplane.enforced) == (2, 1)
        assert core.at_rest()
        core.dataplane.check()
        assert core.dataplane.inet.reconciler.repairs == 0
        kernel.catch_up()
        assert core.dataplane.enforced == 2
        assert in_step(core)


def test_a_change_that_comes_after_a_repair_has_taken_it_in_leaves_the_kernel_as_it_is(tmp_path: Path) -> None:
    """The repair loads the newest state of the table. The change that is carried out later must not undo a part of
    it."""
    kernel = Later()
    with enforcing(tmp_path, kernel) as core:
        disable(tmp_path)
        assert core.intake.sync()
        Nft().load("delete table inet portward\n")
        core.dataplane.check()
        assert core.dataplane.inet.reconciler.repairs == 1
        assert core.dataplane.enforced == 2
        assert in_step(core)
        before = core._netlink.generation()
        kernel.catch_up()
        assert core._netlink.generation() == before
        assert in_step(core)
        assert core.at_rest()


def test_a_change_that_is_lost_on_its_way_to_the_kernel_is_made_good_by_the_next_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Later()
    with enforcing(tmp_path, kernel) as core:
        disable(tmp_path)
        monkeypatch.setattr(core.dataplane, "enforce", fail)
        assert core.intake.sync()
        kernel.catch_up()
        assert core.dataplane.enforced == 1
        assert not core.at_rest()
        core.dataplane.check()
        assert in_step(core)
        assert core.dataplane.enforced == 2


def fail(*_: Any) -> None:
    """Raises an error as a bug of portward would."""
    raise RuntimeError


def test_what_the_store_changed_before_the_ruleset_is_loaded_is_carried_out_by_the_load(tmp_path: Path) -> None:
    """A start reads the store while the workers load their libraries. Cached verdicts that the change does not
    affect stay."""
    kernel = Later()
    other, owned = Source(4242, b"\xc0\x00\x02\x4d"), ip_address("10.0.0.4").packed
    with enforcing(tmp_path) as core:
        index = socket.if_nametoindex(CONTOSO.segment)
        generation = core.generation
        keys = [source.key for source in (other, Source(index, owned))]
        KernelElements(core._netlink).commit([Add("allow4", keys)])
        disable(tmp_path)
        core.close()
        again = Core(core.dataplane.config, core.dataplane.preset, kernel)
        again.intake.first_policy()
        again.first_links(Links({index: CONTOSO.segment}, frozenset()))
        assert again.generation == generation
        assert again.intake.sync()
        kernel.catch_up()
        assert again.dataplane.inet.cache.get(Source(index, owned)) is not None, "nothing is loaded yet"
        again.load()
        assert again.dataplane.inet.cache.get(Source(index, owned)) is None
        assert again.dataplane.inet.cache.get(other) is not None
        assert in_step(again)
        assert again.dataplane.enforced == 2
        again.intake.close()
        again.close()
