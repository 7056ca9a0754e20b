"""Labs with the real agent, for tests that need root. Without root these tests fail; they are not skipped."""

from __future__ import annotations

import contextlib
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
from portward.lab import namespaces
from portward.lab.agent import Agent
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

    def listing(self, set_: str) -> str:
        """One of portward's sets in the kernel, as nft lists it."""
        return namespaces.run(self.lab.gateway, ["nft", "list", "set", "inet", "portward", set_]).stdout

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


def lab_name() -> str:
    """A name for a lab that no other test run has."""
    return f"{LABS}{os.getpid()}x{next(_names)}"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that the tests of a module share. So each test uses addresses of its own."""
    with running_gateway(tmp_path_factory.mktemp("gateway")) as found:
        yield found


@pytest.fixture
def make_gateway(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Makes a gateway for one test, with the settings that it needs."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def make(**settings: Any) -> Gateway:
            folder = tmp_path / lab_name()
            folder.mkdir()
            return stack.enter_context(running_gateway(folder, **settings))

        yield make


class running_gateway:  # noqa: N801 # used as a function
    """A gateway that runs within a `with`. Its table has no owner, unless the settings say otherwise: many tests
    are the other program that changes it."""

    def __init__(self, folder: Path, tenants: tuple[Tenant, ...] = (CONTOSO, FABRIKAM), **settings: Any) -> None:
        self._folder, self._tenants = folder, tenants
        self._settings = {"ruleset": {"owned": "never"}, **settings}

    def __enter__(self) -> Gateway:
        self._lab = Lab(lab_name(), self._tenants)
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
