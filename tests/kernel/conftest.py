"""Labs with the real agent, for tests that need root. Without root these tests fail; they are not skipped."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from kernel.wire import Seen, Sender, same, segment
from portward.config.keys import QueueReader
from portward.dataplane import xtables
from portward.dataplane.names import TABLE, KernelTable
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.errors import KernelError
from portward.lab import namespaces
from portward.lab.agent import Agent
from portward.lab.bridged import BridgedLab
from portward.lab.topology import CONTOSO, FABRIKAM, Lab, Tenant
from portward.model import Attachment, Mode, Record, Subscription

ALLOWED, DENIED = "enterprise-agreement", "pay-as-you-go"
_names = itertools.count()
LABS = "pwt"  # prefix of the names of all labs of tests; the process id and an x follow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder as a kernel test."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@dataclass
class Gateway:
    """A running lab with an agent, and a sender on each tenant's machine."""

    lab: Lab
    agent: Agent
    senders: dict[Tenant, Sender] = field(default_factory=dict)

    def open(self) -> None:
        """Opens the senders' sockets."""
        self.senders = {tenant: Sender(self.lab, tenant) for tenant in self.lab.tenants}

    def source(self, tenant: Tenant, address: str, offer: str, mode: Mode = Mode.ENFORCE) -> UUID:
        """Attaches an address or prefix in a tenant's segment to a new subscription, and waits until the agent
        enforces that; gives the subscription's id."""
        id_ = uuid4()
        self.agent.apply(*source_records(tenant, address, offer, id_, mode))
        return id_

    @property
    def table(self) -> KernelTable:
        """The table that sees the tenants' packets."""
        return KernelTable.BRIDGE if isinstance(self.lab, BridgedLab) else KernelTable.INET

    @property
    def family(self) -> str:
        """The family of that table, in nft's words."""
        return self.table.family

    def listing(self, set_: str) -> str:
        """One of portward's sets in the kernel, as nft lists it."""
        return self.nft("list", "set", self.family, TABLE, set_)

    def nft(self, *words: str) -> str:
        """Runs nft on the gateway; gives its stdout."""
        return namespaces.run(self.lab.gateway, ["nft", *words]).stdout

    def counted(self, name: str) -> int:
        """The packets of a named counter of the ruleset."""
        with namespaces.inside(self.lab.gateway), contextlib.closing(NfNetlink()) as netlink:
            return netlink.of(self.table).counters(TABLE)[name]

    def workers(self) -> set[int]:
        """The processes that read the queues in the gateway's namespace."""
        found = set()
        for pid in namespaces.run(self.lab.gateway, ["ip", "netns", "pids", self.lab.gateway]).stdout.split():
            with contextlib.suppress(OSError):  # it has ended since
                if b"portward.worker.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(int(pid))
        return found

    def passes(
        self, tenant: Tenant, source: str, flags: str = "S", *, patience_s: float = 20.0, **options: Any
    ) -> bool:
        """Whether a packet from `source` reaches the Internet side. A second packet to port 587, which is never
        filtered, follows it. So the result is known when that one arrives, without a long wait. If the first
        packet waits in a queue for a worker, this function waits for it, but not longer than `patience_s`
        seconds."""
        packet = segment(source, flags, **options)
        view = Seen(self.lab.internet)
        try:
            self.senders[tenant].send(packet)
            marker = segment(tenant.address6, "S", port=587)
            self.senders[tenant].send(marker)
            found = False
            is_it, is_marker = same(packet), same(marker)

            def either(other: Any) -> bool:
                nonlocal found
                found = found or is_it(other)
                return is_marker(other)

            assert view.first(either) is not None, "the packet to port 587 did not arrive"
            # The marker may overtake a packet that goes through the queue, because a worker's verdict takes a
            # moment.
            return found or view.late(is_it, self.lab.gateway, patience_s=patience_s) is not None
        finally:
            view.close()


def source_records(
    tenant: Tenant, address: str, offer: str, id_: UUID, mode: Mode = Mode.ENFORCE
) -> tuple[Record, ...]:
    """A subscription with one attachment."""
    return (
        Subscription(id=id_, name=str(id_)[:8], offer=offer, created=date(2022, 6, 30), mode=mode),
        Attachment(segment=tenant.segment, address=ip_network(address), subscription=id_),
    )


@functools.cache
def takes_bridges() -> bool:
    """Whether this kernel takes a queue in a bridge, so that bridged segments get verdicts."""
    name = lab_name()
    namespaces.make(name)
    try:
        with namespaces.inside(name), contextlib.closing(NfNetlink()) as netlink:
            return xtables.has_native_queue(Nft(netlink), KernelTable.BRIDGE)
    finally:
        namespaces.remove(name)


def require_bridges() -> None:
    """Skips the test on a kernel that takes no queue in a bridge."""
    if not takes_bridges():
        pytest.skip("this kernel takes no queue in a bridge: `make test-vm` runs this on one that does")


# The kinds of labs in which the same tests run. The second one has bridges alone.
LAB_KINDS = {"routed": Lab, "bridged": BridgedLab}


def lab_name() -> str:
    """A name for a lab that no other test run has."""
    return f"{LABS}{os.getpid()}x{next(_names)}"


def lab_of(kind: str, tenants: tuple[Tenant, ...] = (CONTOSO, FABRIKAM)) -> Lab:
    """A lab that is not up yet. `kind` is one of LAB_KINDS; bridges are skipped as `require_bridges` says."""
    if kind != "routed":
        require_bridges()
    return LAB_KINDS[kind](lab_name(), tenants)


def br_netfilter(lab: Lab, *, on: bool) -> None:
    """Whether frames in the bridges of a lab's gateway meet the tables of IP, too. Skips the test on a kernel
    without br_netfilter."""
    names = ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables")
    try:
        namespaces.sysctl(lab.gateway, *(f"net.bridge.{name}={int(on)}" for name in names))
    except KernelError:
        if on:
            pytest.skip("this kernel has no br_netfilter")


@pytest.fixture(scope="module")
def lab_kind() -> str:
    """The kind of the labs of a module's gateways, one of LAB_KINDS. A module that has tests for all kinds has a
    fixture of its own with this name."""
    return "routed"


@pytest.fixture(scope="module")
def gateway(lab_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that the tests of a module share. So each test uses addresses of its own."""
    with running_gateway(tmp_path_factory.mktemp("gateway"), kind=lab_kind) as found:
        yield found


@pytest.fixture
def make_gateway(tmp_path: Path, lab_kind: str) -> Iterator[Callable[..., Gateway]]:
    """Makes a gateway for one test, with the settings that it needs."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def make(**settings: Any) -> Gateway:
            folder = tmp_path / lab_name()
            folder.mkdir()
            return stack.enter_context(running_gateway(folder, kind=lab_kind, **settings))

        yield make


class running_gateway:  # noqa: N801 # used as a function
    """A gateway that runs within a `with`."""

    def __init__(
        self,
        folder: Path,
        tenants: tuple[Tenant, ...] = (CONTOSO, FABRIKAM),
        *,
        kind: str = "routed",
        **settings: Any,
    ) -> None:
        """`kind` is one of LAB_KINDS, `settings` are keys of the configuration."""
        self._folder, self._tenants, self._kind, self._settings = folder, tenants, kind, settings

    def __enter__(self) -> Gateway:
        if self._kind != "routed" and self._settings.get("queue", {}).get("reader") == QueueReader.NETFILTERQUEUE:
            pytest.skip("NetfilterQueue does not read the frames of a bridge")
        self._lab = lab_of(self._kind, self._tenants)
        self._lab.up()
        self._agent = Agent(self._lab, self._folder, **self._settings)
        try:
            records = [
                *source_records(CONTOSO, "10.0.0.4", ALLOWED, uuid4()),
                *source_records(FABRIKAM, "10.0.0.4", DENIED, uuid4()),
            ]
            self._agent.apply(*records)
            self._agent.start()
        except BaseException:
            self.__exit__()
            raise
        found = Gateway(self._lab, self._agent)
        found.open()
        self._gateway = found
        return found

    def __exit__(self, *_: object) -> None:
        for sender in getattr(self, "_gateway", Gateway(self._lab, self._agent)).senders.values():
            sender.close()
        self._agent.stop()
        self._lab.down()


@pytest.fixture(autouse=True, scope="session")
def the_machine_is_left_alone() -> Iterator[None]:
    """Fails if the tests changed the machine's own ruleset, or if they left namespaces behind. Those are
    removed."""
    before = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    yield
    after = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    assert after == before
    left = namespaces.names(f"{LABS}{os.getpid()}x")
    for name in left:
        namespaces.remove(name)
    assert not left
