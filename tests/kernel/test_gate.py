"""The gate: while the agent searches large sets for revoked sources, no cached verdict lets a revoked source
pass."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import date
from ipaddress import ip_network
from pathlib import Path
from uuid import UUID

import pytest
from scapy.layers.inet import TCP

from kernel.conftest import ALLOWED, DENIED, lab_name
from kernel.wire import Sender, same, seen, segment
from portward.base.clock import utc_now
from portward.config.keys import Config, Queue
from portward.daemon import workers
from portward.dataplane import verdict_cache as cache
from portward.dataplane import xtables
from portward.dataplane.desired import Desired
from portward.dataplane.elements import Add
from portward.dataplane.names import FIXED_SETS, TABLE
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.setdump import SetRow
from portward.dataplane.sync import Found, KernelSync
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, Lab, Tenant
from portward.model import Attachment, Exemption, Mode, Subscription
from portward.policy import presets
from portward.table.commits import Answers
from portward.table.writer import Writer

REVOKED, STAYS, OTHERS = UUID(int=1), UUID(int=2), UUID(int=3)
# An IPv4 and an IPv6 source of each subscription. The revoked ones are in prefixes that are revoked as a whole.
GO = ("10.0.0.68", "2001:db8:1001:2::4")
STAY = ("10.0.0.4", "2001:db8:1001::4")
ELSEWHERE = ("10.0.0.4", "2001:db8:1002::4")
PREFIXES = ("10.0.0.64/26", "2001:db8:1001:2::/64")
_CROWD = 9_000
_CROWD_LINK = 4_242
_SECONDS = 10.0


class Died(BaseException):
    """Stands for the end of the process at this point."""


class Halting(KernelElements):
    """The kernel's elements, with a search that can be halted. If `halts` is set, a reading of a set of verdicts
    that let packets pass sets `halted` and waits for `go_on`. Then it goes on, or raises `Died` if `dies` is
    set."""

    halts = dies = False

    def __init__(self, netlink: NfNetlink) -> None:
        super().__init__(netlink)
        self.halted, self.go_on = threading.Event(), threading.Event()

    def rows(self, set_: str) -> list[SetRow]:
        """See `Elements`."""
        if self.halts and set_.startswith(("allow", "observed")):
            self.halted.set()
            assert self.go_on.wait(_SECONDS * 3)
            if self.dies:
                raise Died
        return super().rows(set_)


def offer(id_: UUID, name: str, mode: Mode = Mode.ENFORCE) -> Subscription:
    return Subscription(id=id_, offer=name, created=date(2022, 6, 30), mode=mode)


class Gated:
    """Table writer, ruleset and cache in the calling thread's namespace, in a lab, with many cached verdicts."""

    def __init__(self, lab: Lab, folder: Path, *, reject: bool, mode: Mode) -> None:
        self.lab = lab
        self.config, self._preset = Config(segments=("vni*",), uplinks=("up0",)), presets.load("azure-2020")
        self.netlink = NfNetlink()
        self._nft = Nft(self.netlink, compiles=False)
        self.elements = Halting(self.netlink)
        self.cache = VerdictCache(self.elements)
        self._native = xtables.has_native_queue(self._nft)
        self.writer = Writer(folder, self._preset, Answers(observe=False, reject=reject))
        self.reconciler = RulesetReconciler(self._nft, self.netlink, self.cache)
        self.links = {tenant: socket.if_nametoindex(tenant.segment) for tenant in (CONTOSO, FABRIKAM)}
        self._fill(mode)
        self.sync = self._sync()
        self.senders = {tenant: Sender(lab, tenant) for tenant in self.links}
        self.revision = 1

    def _sync(self) -> KernelSync:
        return KernelSync(
            self.reconciler, self.cache, RateLimits(self.elements), lambda sources: None, native=self._native
        )

    def _fill(self, mode: Mode) -> None:
        """Writes the policy: in CONTOSO's segment a subscription with prefixes, and one with single addresses; in
        FABRIKAM's segment a third one. In observe mode the first one passes in spite of its offer."""
        places = [(CONTOSO, network, REVOKED) for network in PREFIXES]
        places += [(CONTOSO, address, STAYS) for address in STAY]
        places += [(FABRIKAM, address, OTHERS) for address in ELSEWHERE]
        records: list[Subscription | Exemption | Attachment] = [
            offer(REVOKED, DENIED if mode is Mode.OBSERVE else ALLOWED, mode),
            offer(STAYS, ALLOWED),
            offer(OTHERS, ALLOWED),
            *(
                Attachment(segment=tenant.segment, address=ip_network(place), subscription=id_)
                for tenant, place, id_ in places
            ),
        ]
        self.writer.replace(records, revision=1, store=b"gate".ljust(16), now=utc_now())
        links = {index: (tenant.segment, False) for tenant, index in self.links.items()}
        self.writer.put_links(links, touched=frozenset(), now=utc_now())

    @property
    def desired(self) -> Desired:
        """The desired state of the kernel."""
        links = {tenant.segment: (index,) for tenant, index in self.links.items()}
        return Desired(self.config, self._preset, self.generation, self.revision, links)

    @property
    def generation(self) -> int:
        """The policy table's generation."""
        head = self.writer.head()
        assert head is not None
        return head.generation

    def crowd(self) -> None:
        """Caches `_CROWD` sources behind another interface: enough that a search puts a gate up."""
        keys = [Source(_CROWD_LINK, (0xC0000000 + number).to_bytes(4, "big")).key for number in range(_CROWD)]
        self.elements.commit([Add("allow4", keys)])
        assert len(list(self.cache.elements())) >= _CROWD, "the sizes are known from a reading"

    @contextmanager
    def revoking(self, *, dies: bool = False) -> Iterator[None]:
        """Within the `with`, the revoking change is under way and its search is halted. At the end the change is
        complete, or has died with `dies`."""
        self.revision += 1
        committed = self.writer.apply([offer(REVOKED, DENIED)], [], revision=self.revision, now=utc_now())
        self.elements.halts, self.elements.dies = True, dies
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self.sync.apply(self.desired, committed)
            except Died as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert self.elements.halted.wait(_SECONDS)
            yield
        finally:
            self.elements.halts = False
            self.elements.go_on.set()
            thread.join()
        assert bool(failed) is dies

    def pass_of(self, tenant: Tenant, sources: tuple[str, ...], *, times: int = 1, to: str | None = None) -> int:
        """How many of `times` packets from each of the sources reach the Internet side."""
        packets = [segment(source, to=to) for source in sources for _ in range(times)]
        with seen(self.lab.internet) as view:
            for packet in packets:
                self.senders[tenant].send(packet)
            missing = {packet[TCP].seq for packet in packets}

            def last(arrived: object) -> bool:
                missing.difference_update(
                    packet[TCP].seq
                    for packet in packets
                    if same(packet)(arrived)  # type: ignore[arg-type]
                )
                return not missing

            view.first(last, seconds=0.2)
            if missing:
                view.late(last, self.lab.gateway)
        return len(packets) - len(missing)

    def missed(self) -> int:
        """How many packets have gone to a worker."""
        return self.netlink.counters(TABLE)["missed"]

    def is_gated(self) -> tuple[int, int, int]:
        """How many rules, gated interfaces and enforced generations a gate has in the kernel: (0, 0, 0), or
        (1, number of interfaces, 1)."""
        rows = [len(self.elements.rows(name)) for name in ("gated", "enforced")]
        return len(self.netlink.rules_on(TABLE, "screen", "gated")), rows[0], rows[1]

    def cached_allows(self) -> list[bool]:
        """For each revoked source, whether a verdict that lets it pass is cached."""
        sources = [Source(self.links[CONTOSO], ip_network(one).network_address.packed) for one in GO]
        return [
            any(self.elements.element(name + one.family, one.key) is not None for name in ("allow", "observed"))
            for one in sources
        ]

    def close(self) -> None:
        """Closes sockets and table."""
        for sender in self.senders.values():
            sender.close()
        self.writer.close()
        self.netlink.close()


def run(
    folder: Path,
    body: Callable[[Gated, workers.Worker], Awaitable[None]],
    *,
    reject: bool = False,
    mode: Mode = Mode.ENFORCE,
) -> None:
    """Runs `body` in a lab's gateway that enforces and has a cached verdict of each source."""

    async def work(stack: ExitStack, lab: Lab) -> None:
        gated = stack.enter_context(closing(Gated(lab, folder, reject=reject, mode=mode)))
        worker = workers.make(Queue(), folder, lambda source: None)[0]
        await worker.start()
        try:
            gated.sync.apply(gated.desired)
            for tenant, sources in ((CONTOSO, GO + STAY), (FABRIKAM, ELSEWHERE)):
                until(lambda: gated.pass_of(tenant, sources) == len(sources), "each passes at first")  # noqa: B023
            gated.crowd()
            await body(gated, worker)
        finally:
            await worker.stop()

    with ExitStack() as stack:
        lab = stack.enter_context(Lab(lab_name(), (CONTOSO, FABRIKAM)))
        stack.enter_context(namespaces.inside(lab.gateway))
        asyncio.run(work(stack, lab))


@pytest.mark.parametrize(
    ("mode", "reject"),
    [(Mode.ENFORCE, False), (Mode.ENFORCE, True), (Mode.OBSERVE, False)],
    ids=["drop", "reject", "observed before"],
)
def test_a_revoked_source_does_not_pass_by_its_cached_verdict_during_the_search(
    tmp_path: Path, mode: Mode, reject: bool
) -> None:
    async def body(gated: Gated, _: workers.Worker) -> None:
        before, old = gated.netlink.fingerprint(TABLE, FIXED_SETS), gated.generation
        namespaces.batch(gated.lab.gateway, ["route replace 10.9.0.0/16 via 198.51.100.2"])
        with gated.revoking():
            assert gated.cached_allows() == [True, True], "the search has not come to it"
            assert (gated.cache.enforces(gated.generation), gated.cache.synced()) == (True, old)
            assert gated.is_gated() == (1, 1, 1)
            assert gated.pass_of(CONTOSO, GO, times=20) == 0
            asked = gated.missed()
            assert gated.pass_of(CONTOSO, STAY, times=3) == 6
            assert gated.missed() == asked + 6, "asked about, in spite of the cached verdict"
            assert gated.pass_of(FABRIKAM, ELSEWHERE, times=3) == 6
            assert gated.missed() == asked + 6, "another interface goes on with its cached verdicts"
            assert gated.pass_of(CONTOSO, GO[:1], to="10.9.0.1") == 1, "an internal destination"
        assert gated.is_gated() == (0, 0, 0)
        assert gated.cached_allows() == [False, False]
        assert gated.cache.synced() == gated.generation
        assert gated.netlink.fingerprint(TABLE, FIXED_SETS) == before
        assert (gated.sync.apply(gated.desired), gated.reconciler.repairs) == (Found.AS_LEFT, 0)
        assert gated.pass_of(CONTOSO, GO, times=3) == 0
        assert gated.pass_of(CONTOSO, STAY) == 2

    run(tmp_path, body, reject=reject, mode=mode)


@pytest.mark.parametrize("mode", [Mode.ENFORCE, Mode.OBSERVE])
def test_without_the_gate_the_revoked_source_is_seen_to_pass(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the test above can fail: without a gate the revoked source passes."""
    monkeypatch.setattr(cache, "MIN_GATED_ELEMENTS", 1 << 30)

    async def body(gated: Gated, _: workers.Worker) -> None:
        with gated.revoking():
            assert not gated.cache.enforces(gated.generation)
            assert gated.pass_of(CONTOSO, GO, times=3) == 6

    run(tmp_path, body, mode=mode)


def test_without_a_worker_nothing_passes_the_gate(tmp_path: Path) -> None:
    async def body(gated: Gated, worker: workers.Worker) -> None:
        with gated.revoking():
            await worker.stop()
            assert gated.pass_of(CONTOSO, GO + STAY, times=3) == 0
            assert gated.pass_of(FABRIKAM, ELSEWHERE) == 2, "by its cached verdict"

    run(tmp_path, body)


def test_a_gate_that_is_left_by_a_process_that_died_goes_with_the_next_start(tmp_path: Path) -> None:
    async def body(gated: Gated, _: workers.Worker) -> None:
        with gated.revoking(dies=True):
            pass
        assert gated.is_gated() == (1, 1, 1)
        assert gated.pass_of(CONTOSO, GO, times=3) == 0
        assert gated._sync().apply(gated.desired) is Found.STALE, "what is cached is forgotten"
        assert gated.is_gated() == (0, 0, 0)
        assert gated.cached_allows() == [False, False]
        assert gated.pass_of(CONTOSO, GO, times=3) == 0
        assert gated.pass_of(CONTOSO, STAY) == 2

    run(tmp_path, body)


def test_a_gate_that_another_program_takes_away_is_no_obstacle_to_the_repair(tmp_path: Path) -> None:
    """The agent's next check finds the change and restores the ruleset."""

    async def body(gated: Gated, _: workers.Worker) -> None:
        with gated.revoking():
            namespaces.run(gated.lab.gateway, ["nft", "flush chain inet portward screen"])
        assert gated.sync.apply(gated.desired) is Found.CHANGED
        assert gated.is_gated() == (0, 0, 0)
        assert gated.pass_of(CONTOSO, GO, times=3) == 0
        assert gated.pass_of(CONTOSO, STAY) == 2

    run(tmp_path, body)
