"""Counts stale cached verdicts of a source whose policy changes again and again while it sends and its worker is
slow.

This uses portward's real table writer, ruleset, verdict cache and worker in a lab's gateway, but not the daemon.
So the cache can be read after each change, just before the next one.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import date
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import UUID

from kernel.wire import Sender, meanwhile, segment
from portward.base.clock import utc_now
from portward.config.keys import Config, Queue, QueueReader
from portward.daemon import workers
from portward.dataplane import xtables
from portward.dataplane.desired import Desired
from portward.dataplane.names import KernelTable
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.sync import KernelSync
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.ipc.mark import Class
from portward.lab import namespaces
from portward.lab.bridged import BridgedLab
from portward.lab.topology import CONTOSO, Lab
from portward.model import Attachment, Subscription
from portward.policy import presets
from portward.table.commits import Answers, Committed
from portward.table.writer import Writer

_SUBSCRIPTION = UUID(int=5)
_SLOW = Path(__file__).parent / "slow"
PAUSE = 0.003


class Churn:
    """Table writer, ruleset, cache and worker in the calling thread's namespace, and one source that sends."""

    def __init__(self, lab: Lab, folder: Path, address: str, reader: QueueReader) -> None:
        self._lab, self._address = lab, address
        self._config = Config(segments=("vni*",), uplinks=("up0",), queue=Queue(reader=reader))
        self._preset = presets.load("azure-2020")
        table = KernelTable.BRIDGE if isinstance(lab, BridgedLab) else KernelTable.INET
        self._table = table
        self._netlink = NfNetlink().of(table)
        self._nft = Nft(self._netlink, compiles=False)
        self.elements = KernelElements(self._netlink)
        self.cache = VerdictCache(self.elements)
        native = xtables.has_native_queue(self._nft, table)
        self.writer = Writer(folder, self._preset, Answers(observe=False, reject=False))
        self.sync = KernelSync(
            RulesetReconciler(self._nft, self._netlink, self.cache), self.cache, RateLimits(self.elements),
            lambda sources: None, native=native, table=table,
        )  # fmt: skip
        index = socket.if_nametoindex(CONTOSO.segment)
        self._source = Source(index, ip_address(address).packed)
        self.links = {CONTOSO.segment: (index,)}
        attachment = Attachment(segment=CONTOSO.segment, address=ip_network(address), subscription=_SUBSCRIPTION)
        self.writer.replace(
            [_offer("pay-as-you-go"), attachment], revision=1, store=b"churn".ljust(16), now=utc_now()
        )
        self.writer.put_links({index: (CONTOSO.segment, False)}, touched=frozenset(), now=utc_now())
        self._folder, self._revision = folder, 1

    def run(self, changes: int, enforce: Callable[[Committed], None]) -> tuple[int, int]:
        """Makes `changes` changes of policy, each carried out by `enforce`. Gives after how many of them a stale
        verdict was cached, and after how many any verdict was."""
        return asyncio.run(self._run(changes, enforce))

    async def _run(self, changes: int, enforce: Callable[[Committed], None]) -> tuple[int, int]:
        worker = workers.make(self._config.queue, self._folder, lambda source: None)[0]
        with _slowed():
            await worker.start()
        self.sync.apply(self._desired())
        stale = cached = 0
        try:
            with self._traffic():
                for number in range(changes):
                    wanted = Class.ALLOW if number % 2 else Class.DENY
                    self._revision += 1
                    offer = _offer("enterprise-agreement" if number % 2 else "pay-as-you-go")
                    enforce(self.writer.apply([offer], [], revision=self._revision, now=utc_now()))
                    time.sleep(random.random() * PAUSE)  # pause: changes come at random
                    held = self.cache.get(self._source)
                    cached += held is not None
                    stale += held is not None and held.verdict is not wanted
        finally:
            await worker.stop()
            self.writer.close()
        return stale, cached

    def carry_out(self, committed: Committed) -> None:
        """Brings the kernel in line with the policy table after a change."""
        self.sync.apply(self._desired(), committed)

    def _desired(self) -> Desired:
        head = self.writer.head()
        assert head is not None
        desired = Desired(self._config, self._preset, head.generation, head.revision, self.links)
        return desired.bridged() if self._table is KernelTable.BRIDGE else desired

    @contextmanager
    def _traffic(self) -> Iterator[None]:
        sender, frame = Sender(self._lab, CONTOSO), segment(self._address, "S")

        def send() -> None:
            sender.send(frame)
            time.sleep(0.0003)  # pause: the pace of the sender

        with closing(sender), meanwhile(send):
            yield


def _offer(offer: str) -> Subscription:
    return Subscription(id=_SUBSCRIPTION, offer=offer, created=date(2022, 6, 30))


@contextmanager
def _slowed() -> Iterator[None]:
    """Within the `with`, workers are started that pause between lookup and verdict."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PORTWARD_TEST_PAUSE")}
    os.environ.update(PYTHONPATH=os.fspath(_SLOW), PORTWARD_TEST_PAUSE=str(PAUSE))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def churned(
    lab: Lab,
    folder: Path,
    address: str,
    changes: int,
    enforce: Callable[[Churn, Committed], None],
    reader: QueueReader = QueueReader.BATCH,
) -> tuple[int, int]:
    """Runs `Churn.run` in the gateway of a lab that is up, on a thread of its own; gives its result."""
    found: list[tuple[int, int] | BaseException] = []

    def work() -> None:
        try:
            with namespaces.inside(lab.gateway):
                churn = Churn(lab, folder, address, reader)
                found.append(churn.run(changes, lambda committed: enforce(churn, committed)))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]
