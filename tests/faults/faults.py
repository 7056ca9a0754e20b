"""The faults. Each is a generator that breaks something on a gateway, and yields an outcome each time.

`rounds` says how often: 1 is the short form, which also leaves out slow cases.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final, TypeAlias
from uuid import UUID, uuid4

from faults import traffic
from faults.ground import Ground, Outcome
from faults.inject.points import POINTS, Point
from kernel.conftest import DENIED, source_records
from portward.base.resources import rules
from portward.dataplane.names import KernelTable
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, Tenant
from portward.model import Attachment, Exemption, ExemptionState

FaultFunction: TypeAlias = Callable[[Ground, int], Iterator[Outcome]]
FAULTS: Final[dict[str, FaultFunction]] = {}

# After this many seconds the harness continues a worker that it has stopped.
STOPPED_SECONDS: Final = 6.0
# The harness gives the agent this many seconds to recover by itself, before it restarts the agent or removes the
# table.
_ALONE_SECONDS: Final = 3.0


def fault(function: FaultFunction) -> FaultFunction:
    """Adds a fault to `FAULTS`, under the name of its function."""
    FAULTS[function.__name__.replace("_", "-")] = function
    return function


# --- processes end ---


@fault
def kill_worker(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGKILL of the workers at a random moment, while policy changes."""
    for _ in range(rounds):
        yield ground.fault("SIGKILL of a worker", lambda: _while_changing(ground, _kill_workers))


@fault
def kill_daemon(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGKILL of the daemon at a random moment, while policy changes."""
    for _ in range(rounds):
        yield ground.fault("SIGKILL of the daemon", lambda: _while_changing(ground, _kill_daemon))


@fault
def kill_all(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGKILL of everything at a random moment, while policy changes."""

    def both(ground: Ground) -> None:
        _kill_workers(ground)
        _kill_daemon(ground)

    for _ in range(rounds):
        yield ground.fault("SIGKILL of all", lambda: _while_changing(ground, both))


@fault
def kill_at_points(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGKILL before and after each of the functions in `POINTS`. The short form picks half of the points at
    random, and takes one side of each."""
    for number, point in enumerate(POINTS):
        if rounds == 1 and ground.random.random() < 0.5:
            continue
        for side in ("before", "after") if rounds > 1 else (("before", "after")[number % 2],):
            yield ground.fault(
                f"SIGKILL of the {point.process} at {point.when}",
                lambda point=point, side=side: _end_at(ground, point, side),  # type: ignore[misc] # bound here
                about=f"{side} {point.where}#{point.nth}",
            )


@fault
def memory(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """Out of memory: MemoryError within a step, RLIMIT_AS at the size that a process has, a cgroup's OOM
    killer."""
    raised = [
        ("daemon", "change", "portward.table.writer:Writer.apply"),
        ("daemon", "change", "portward.dataplane.verdict_cache:VerdictCache.move_epoch"),
        ("daemon", "change", "portward.dataplane.verdict_cache:VerdictCache.forget"),
        ("worker", "packet", "portward.table.reader:Reader._follow"),
        ("worker", "packet", "portward.worker.messages:Verdicts.accept"),
        ("worker", "packet", "portward.ipc.counters:WorkerCounters.add"),
    ]
    for _ in range(rounds):
        for place in raised if rounds > 1 else raised[1::2]:
            yield ground.fault(
                f"MemoryError in the {place[0]}",
                lambda place=place: _end_at(ground, Point(*place), "after", "memory"),  # type: ignore[misc]
                about=place[2],
            )
        yield ground.fault("RLIMIT_AS of the worker", lambda: _limited(ground, ground.agents.workers()))
        if rounds > 1:
            yield ground.fault("RLIMIT_AS of the daemon", lambda: _limited(ground, [ground.agents.pid]))
        yield ground.fault("OOM killer takes the daemon", lambda: _out_of_memory(ground))


@fault
def stop_worker(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGSTOP of the workers. Until the daemon notices, packets of new sources get no verdict."""
    for _ in range(rounds):
        yield ground.fault("SIGSTOP of a worker", lambda: _stopped_worker(ground))


@fault
def stop_daemon(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """SIGSTOP of the daemon for some seconds, while policy changes."""

    def act() -> None:
        with ground.changing():
            pid = ground.agents.pid
            ground.kill(pid, signal.SIGSTOP)
            ground.sent_for(2)
            ground.kill(pid, signal.SIGCONT)

    for _ in range(rounds):
        yield ground.fault("SIGSTOP of the daemon for 2 s", act)


@fault
def restarts(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """Many restarts in a row, by SIGTERM and by SIGKILL in turn."""

    def act() -> str:
        for number in range(2 if rounds == 1 else 40 * rounds):
            before = ground.agents.starts
            ground.kill(ground.agents.pid, signal.SIGKILL if number % 2 else signal.SIGTERM)
            until(lambda before=before: ground.agents.starts > before, "started again")  # type: ignore[misc]
            ground.change()
            ground.recovered()
        return f"{number + 1} restarts"

    yield ground.fault("restarts", act)


@fault
def upgrades(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """At each restart another version of the ruleset, with other definitions of the cache's sets, and back."""
    other = ground.control / "rules" / "nftables" / "portward.nft"
    other.parent.mkdir(parents=True, exist_ok=True)

    def act(number: int) -> None:
        if number % 2:
            other.unlink(missing_ok=True)
        else:
            other.write_text(_newer_ruleset())
        before = ground.agents.starts
        with ground.changing():
            ground.kill(ground.agents.pid, signal.SIGTERM)
            until(lambda: ground.agents.starts > before, "started again")
            ground.recovered()
        # A downgrade replaces rules and sets, but the newer version's counter stays. So look for a set's
        # definition.
        newer = (
            "gc-interval" in ground.on_gateway("nft", "-t", "list", "table", *str(KernelTable.INET).split()).stdout
        )
        assert newer == (not number % 2), "another ruleset is loaded than was put in place"

    for number in range(2 if rounds == 1 else 10 * rounds):
        yield ground.fault("upgrade, downgrade", lambda number=number: act(number))  # type: ignore[misc] # bound


def _kill_workers(ground: Ground) -> None:
    found = ground.agents.workers()
    for pid in found:
        ground.kill(pid)
    assert found, "there was no worker to kill"


def _kill_daemon(ground: Ground) -> None:
    before = ground.agents.starts
    ground.kill(ground.agents.pid)
    until(lambda: ground.agents.starts > before, "the daemon was started again")


def _while_changing(ground: Ground, act: Callable[[Ground], None]) -> None:
    with ground.changing():
        time.sleep(0.3 + ground.random.random() * 0.5)  # pause: at any moment between changes
        act(ground)


def _end_at(ground: Ground, point: Point, side: str, action: str = "SIGKILL") -> None:
    """Arms a point, and provokes the event on which the process comes there. Raises TimeoutError if it never
    does."""
    nth = point.nth
    if point.process == "worker" and point.when == "packet":
        nth = ground.random.randint(1, 20)

    def passed() -> bool:
        if not ground.hit():
            _provoke(ground, point)  # again: a change during the daemon's start does not reach every point
        return ground.hit()

    ground.arm(point.process, point.where, side, nth, action)
    try:
        until(passed, f"{point.where} was passed", seconds=90)
    finally:
        ground.disarm()


def _provoke(ground: Ground, point: Point) -> None:
    if point.process == "apply":
        ground.change(ground.agents.environment())
    elif point.when == "change":
        ground.change()
    elif point.when == "start":
        if point.process == "worker":
            _kill_workers(ground)
        else:
            _kill_daemon(ground)
    elif point.when == "empty":
        ground.agents.stop(signal.SIGKILL)
        shutil.rmtree(ground.table)
        ground.agents.start()
    elif point.when == "repair":
        # A rule that opens nothing.
        ground.nft(f"insert rule {KernelTable.INET} refuse drop")
    elif point.when == "links":
        namespaces.ip("-n", ground.lab.gateway, "link", "add", "vni1999", "type", "bridge")
        time.sleep(0.1)  # pause: the agent may or may not see the interface
        namespaces.ip("-n", ground.lab.gateway, "link", "del", "vni1999")
    with contextlib.suppress(TimeoutError):
        until(ground.hit, "passed", seconds=3)


def _limited(ground: Ground, pids: list[int]) -> str:
    """Limits the address space of these processes to its present size, then kills them. Says in the note whether
    the limit ended one before that."""
    assert pids
    for pid in pids:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    for _ in range(3):
        ground.change()
    ground.sent_for(1)
    alive = all(Path(f"/proc/{pid}").exists() for pid in pids)
    for pid in pids:
        ground.kill(pid)
    return "lived on" if alive else "ended by it"


def _out_of_memory(ground: Ground) -> str:
    """Puts the daemon into a memory cgroup whose limit it exceeds with the next page. Without such a cgroup on
    this machine, or if the OOM killer does not act, the daemon is killed; the note says so."""
    group = Path("/sys/fs/cgroup/memory") / ground.lab.name
    try:
        group.mkdir()
    except OSError:
        _kill_daemon(ground)  # the OOM killer sends SIGKILL, too
        return "no cgroup of memory here: SIGKILL instead"
    try:
        before = ground.agents.starts
        (group / "memory.limit_in_bytes").write_text("65536")
        (group / "cgroup.procs").write_text(str(ground.agents.pid))
        for _ in range(5):
            if ground.agents.starts == before:
                ground.change()
        killed = ground.agents.starts > before
        if not killed:
            _kill_daemon(ground)
        return "OOM-killed" if killed else "not OOM-killed: SIGKILL"
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)  # pause: of a poll


def _stopped_worker(ground: Ground) -> str:
    found = ground.agents.workers()
    assert found, "there was no worker to stop"
    start = time.monotonic()
    for pid in found:
        ground.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: ground.traffic.opens(start + 0.5), "connections again", seconds=STOPPED_SECONDS)
    except TimeoutError:
        return f"nobody noticed within {STOPPED_SECONDS:.0f} s"
    finally:
        for pid in found:
            ground.kill(pid, signal.SIGCONT)
    return f"noticed: connections again {time.monotonic() - start:.1f} s after it"


def _newer_ruleset() -> str:
    """The shipped ruleset with other definitions of the cache's sets, one more counter and one more rule."""
    text = rules("nftables", "portward.nft").read_text()
    text = text.replace("timeout 60s; size", "timeout 60s; gc-interval 3s; size")
    text = text.replace(
        "table inet portward {", 'table inet portward {\n  counter extra { comment "of the next version" }'
    )
    return text.replace("    counter name missed\n", "    counter name missed\n    counter name extra\n")


# --- files ---


@fault
def disk_full(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """The disk of table and store is full during changes, or during a start of the daemon; then there is room
    again."""
    for _ in range(rounds):
        yield ground.fault("disk full, while running", lambda: _full(ground, lambda: None))
        yield ground.fault("disk full, daemon started", lambda: _full(ground, lambda: _kill_daemon(ground)))


def _full(ground: Ground, act: Callable[[], None]) -> str:
    filler = ground.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
            accepted = sum(ground.change() for _ in range(3))
            act()
            ground.sent_for(1)
            accepted += sum(ground.change() for _ in range(2))
        finally:
            filler.unlink()
    return f"{accepted} of 5 changes accepted meanwhile"


@fault
def table_file(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """The policy table's file is truncated, replaced, overwritten or deleted, while the agent runs or between two
    runs."""
    for _ in range(rounds):
        for number, (name, damage) in enumerate(_DAMAGES.items()):
            if damage is _halved and rounds == 1:
                continue  # a known limitation, see `_damaged`; it takes long
            for running in (True, False) if rounds > 1 else (bool(number % 2),):
                when = "while running" if running else "between runs"
                yield ground.fault(
                    f"table {name}, {when}",
                    lambda damage=damage, running=running: _damaged(ground, damage, running),  # type: ignore[misc]
                )


def _truncated(path: Path) -> None:
    os.truncate(path, 4096)


def _halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replaced(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(b"another file\n" * 1000)
    new.rename(path)


def _scrambled(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(os.urandom(size))


def _deleted(path: Path) -> None:
    path.unlink()


def _inner_pages(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(2 * 4096)  # keep LMDB's two meta pages, which point to all others
        file.write(os.urandom(size - 2 * 4096))


_DAMAGES: Final = {
    "truncated to a page": _truncated,
    "truncated to half": _halved,
    "replaced by another file": _replaced,
    "overwritten at random": _scrambled,
    "overwritten but for two pages": _inner_pages,
    "deleted": _deleted,
}


def _damaged(ground: Ground, damage: Callable[[Path], None], running: bool) -> str:
    path = ground.table / "data.mdb"
    if running:
        damage(path)
    else:
        ground.agents.stop(signal.SIGKILL)
        damage(path)
        ground.agents.start()
    ground.change()
    with contextlib.suppress(TimeoutError):
        ground.recovered(_ALONE_SECONDS)
        if not ground.wrong():
            return ""
    # A restart is the first thing that a supervisor or an operator would try.
    _kill_daemon(ground)
    with contextlib.suppress(TimeoutError):
        ground.recovered(_ALONE_SECONDS)
        if not ground.wrong():
            return "needed a restart"
    said = ground.last_words()
    ground.agents.stop(signal.SIGKILL)
    shutil.rmtree(ground.table)
    ground.agents.start()
    if damage is _halved:
        return "known: whoever reads beyond the end gets SIGBUS; somebody had to remove the table"
    raise AssertionError(f"a restart was not enough, somebody had to remove the table: {said}")


@fault
def store_locked(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """Another process holds a write lock on the store for some seconds."""

    def act() -> None:
        connection = sqlite3.connect(ground.store, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            with ground.changing():
                ground.sent_for(2)
                connection.execute("ROLLBACK")
        finally:
            connection.close()

    for _ in range(rounds):
        yield ground.fault("store locked for 2 s", act)


@fault
def store_file(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """The store's file is replaced by a backup; or it is overwritten and restored, also with a restart in between;
    or it is deleted and restored."""
    for _ in range(rounds):
        yield ground.fault("store replaced by its backup", lambda: _restored(ground, lambda path: None))
        if rounds > 1:
            yield ground.fault("store overwritten, restored", lambda: _restored(ground, _scrambled))
        yield ground.fault(
            "store overwritten, daemon restarted, restored", lambda: _restored(ground, _scrambled, True)
        )
        yield ground.fault("store deleted, restored", lambda: _restored(ground, _deleted))


def _restored(ground: Ground, damage: Callable[[Path], None], restart: bool = False) -> str:
    backup = ground.store.with_name("backup.db")
    source, copy = sqlite3.connect(ground.store), sqlite3.connect(backup)
    with copy:
        source.backup(copy)
    source.close()
    copy.close()
    damage(ground.store)
    accepted = False
    if damage in (_scrambled,):
        accepted = ground.change()
    if restart:
        _kill_daemon(ground)
    if damage in (_scrambled, _deleted):
        ground.sent_for(1.5)
    for name in ("portward.db-wal", "portward.db-shm"):
        ground.store.with_name(name).unlink(missing_ok=True)
    backup.rename(ground.store)
    ground.change()
    return "a change was accepted by a damaged store" if accepted else ""


# --- the kernel's side ---


@fault
def rules_removed(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """Another program removes or changes rules. The outcome says how many packets come out, and for how long."""
    table = str(KernelTable.INET)

    def flush_ruleset() -> None:
        ground.nft("flush ruleset")
        namespaces.load(ground.lab.gateway, "\n".join(ground.lab._translation()))

    def delete_rule() -> None:
        listing = ground.on_gateway("nft", "-a", "list", "chain", *table.split(), "screen").stdout
        handle = next(line.rpartition(" ")[2] for line in listing.splitlines() if "goto cached6" in line)
        ground.nft(f"delete rule {table} screen handle {handle}")

    acts: dict[str, Callable[[], None]] = {
        "nft flush ruleset": flush_ruleset,
        "nft delete table": lambda: ground.nft(f"delete table {table}"),
        "the table made dormant": lambda: ground.nft(f"add table {table} {{ flags dormant; }}"),
        "chain screen flushed": lambda: ground.nft(f"flush chain {table} screen"),
        "chain cached6 flushed": lambda: ground.nft(f"flush chain {table} cached6"),
        "chain verdict flushed": lambda: ground.nft(f"flush chain {table} verdict"),
        "the rule to chain cached6 deleted": delete_rule,
        "an accepting rule inserted": lambda: ground.nft(f"insert rule {table} screen accept"),
        "internal prefixes emptied": lambda: ground.nft(f"flush set {table} internal4"),
        "another epoch set": lambda: ground.nft(
            f"flush set {table} epoch\nadd element {table} epoch {{ 0xfff0 }}"
        ),
        "chain to_workers flushed": lambda: ground.nft(f"flush chain {table} to_workers"),
        "chain divert flushed": lambda: ground.nft(f"flush chain {table} divert"),
    }
    for _ in range(rounds):
        for name, act in acts.items():
            yield _removal(ground, name, act)


def _removal(ground: Ground, name: str, act: Callable[[], None]) -> Outcome:
    back = 0.0

    def removed() -> str:
        nonlocal back
        time.sleep(ground.random.random() * 0.25)  # pause: at any moment between two checks of the daemon
        repairs, whole = ground.repairs(), ground.loaded()
        act()
        start, damaged = time.monotonic(), ground.loaded()
        until(lambda: ground.repairs() > repairs, "the daemon puts it back")
        if damaged != whole:  # otherwise it was back before this process could read it
            until(lambda: ground.loaded() != damaged, "it is back")
        back = time.monotonic() - start
        return f"back after {back * 1000:.0f} ms"

    outcome = ground.fault(name, removed, may_leak=True)
    figures = outcome.figures
    return outcome._replace(
        back=max(back, figures.leak_seconds),
        note=f"{outcome.note}, {len(figures.leaked)} packets out in {figures.leak_seconds * 1000:.0f} ms",
    )


@fault
def element_added(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """Another program adds a blocked source to the set of cached allows. The note says how long it stays there."""

    def act() -> str:
        start, before = time.monotonic(), len(ground.traffic.leaked)
        # The ruleset tests the set of denied sources first, so the source's cached denial has to be deleted, too.
        source = traffic.BLOCKED4[7]
        index = ground.index(FABRIKAM)
        ground.nft(
            f"delete element {KernelTable.INET} deny4 {{ {index} . {source} }}\n"
            f"add element {KernelTable.INET} allow4 {{ {index} . {source} }}"
        )
        # The daemon compares a sample of the cached verdicts with the table every five seconds. On a busy machine
        # its step may take some seconds more: the figure is in the note.
        while (waited := time.monotonic() - start) < 60:
            ground.sent_for(0.5)
            leaked = ground.traffic.leaked[before:]
            if not leaked or leaked[-1] < time.monotonic() - 0.3:
                return f"{len(leaked)} packets out, forgotten after {leaked[-1] - start if leaked else 0:.2f} s"
        ground.nft(f"delete element {KernelTable.INET} allow4 {{ {index} . {source} }}")
        raise AssertionError(f"{len(leaked)} packets out within {waited:.1f} s, nobody noticed")

    for _ in range(rounds):
        yield ground.fault("a blocked source added to allow4", act, may_leak=True)


@fault
def interfaces(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """Segments are deleted and made anew, with another interface index or the same one; the uplink goes down and
    up."""

    def flap(number: int) -> None:
        tenant = (FABRIKAM, CONTOSO)[number % 2]
        if number % 4 == 3:
            _uplink(ground)
        else:
            _made_anew(ground, tenant, same_index=number % 4 == 2)

    flaps = 4 if rounds == 1 else 10 * rounds
    names = ("segment of the blocked made anew", "segment of the allowed made anew",
             "segment of the blocked made anew, same index", "uplink down and up")  # fmt: skip
    for number in range(flaps):
        yield ground.fault(names[number % 4], lambda number=number: flap(number))  # type: ignore[misc] # bound


def _made_anew(ground: Ground, tenant: Tenant, *, same_index: bool) -> None:
    gateway, place = ground.lab.gateway, ground.lab.tenants.index(tenant)
    under = ip_address(f"192.0.2.{4 * place}")
    index = ground.index(tenant)
    namespaces.ip("-n", gateway, "link", "del", tenant.segment)
    time.sleep(ground.random.random() * 0.05)  # pause: at any moment
    number = f"index {index} " if same_index else ""
    namespaces.batch(
        gateway,
        [
            f"link add {number}name {tenant.segment} type vxlan id {tenant.vni} local {under + 1} "
            f"remote {under + 2} dstport 4789",
            f"link set {tenant.segment} up",
            f"addr add 10.0.0.1/24 dev {tenant.segment}",
            f"addr add 2001:db8:{tenant.vni}::1/64 dev {tenant.segment} nodad",
            f"route replace 10.0.0.0/24 dev {tenant.segment} table {tenant.vni}",
        ],
    )
    traffic.route(ground.lab)
    namespaces.ip("-n", ground.lab.home(tenant), "neigh", "flush", "all")
    ground.traffic.renew()
    ground.sent_for(0.2)


def _uplink(ground: Ground) -> None:
    gateway, there = ground.lab.gateway, ground.lab.internet
    namespaces.ip("-n", gateway, "link", "set", "up0", "down")
    time.sleep(0.1)  # pause: the link stays down for a moment
    namespaces.ip("-n", gateway, "link", "set", "up0", "up")
    namespaces.batch(
        gateway,
        [
            "addr replace 2001:db8:ffff::1/64 dev up0 nodad",
            "route replace default via 198.51.100.2",
            "route replace ::/0 via 2001:db8:ffff::2",
        ],
    )
    namespaces.batch(there, ["route replace default via 198.51.100.1", "route replace ::/0 via 2001:db8:ffff::1"])


# --- time ---


@fault
def clock(ground: Ground, rounds: int) -> Iterator[Outcome]:
    """The wall clock is set forward or back, and later set right. A grant with an end must end in time."""
    for _ in range(rounds):
        yield ground.fault("clock two hours forward and back", lambda: _forward(ground))
        if rounds > 1:
            yield ground.fault("clock an hour back and forward", lambda: _back(ground))


def _forward(ground: Ground) -> str:
    with _granted(ground, timedelta(hours=1)) as (source, _):
        _expect(ground, source, True, "a grant of an hour")
        ground.shift(7200)
        _expect(ground, source, False, "two hours later it has ended")
        ground.shift(0)
        ground.sent_for(1.5)
        return "set back again, the grant " + ("counts again" if _passes(ground, source) else "stays ended")


def _back(ground: Ground) -> str:
    with _granted(ground, timedelta(seconds=3)) as (source, until_):
        _expect(ground, source, True, "a grant of three seconds")
        ground.shift(-3600)
        while datetime.now(UTC) < until_ + timedelta(seconds=1.2):
            time.sleep(0.1)  # pause: of a poll
        _expect(ground, source, False, "it has ended, though by its clock there is an hour left")
        ground.shift(0)
        _expect(ground, source, False, "the clock is right again, and it has ended")
        return "ended in time, though by the wrong clock there was an hour left"


@contextlib.contextmanager
def _granted(ground: Ground, how_long: timedelta) -> Iterator[tuple[str, datetime]]:
    id_: UUID = uuid4()
    source = str(traffic.SUBJECTS4[20_000 + ground.random.randrange(5_000)])
    now = datetime.now(UTC)
    attachment = Attachment(
        segment=CONTOSO.segment, address=ip_network(source), subscription=id_, started=now - timedelta(seconds=1)
    )
    account = source_records(CONTOSO, source, DENIED, id_)[0]
    granted = Exemption(
        subscription=id_, state=ExemptionState.GRANTED, requested=now - timedelta(days=2),
        decided=now - timedelta(days=1), until=now + how_long,
    )  # fmt: skip
    assert ground.apply([account, attachment, granted])
    assert granted.until is not None
    try:
        yield source, granted.until
    finally:
        ground.shift(0)
        assert ground.apply([Exemption(subscription=id_, state=ExemptionState.REVOKED, decided=now)])


def _passes(ground: Ground, source: str) -> bool:
    """Whether packets of a source of the allowed tenant's segment come out now."""
    frames = ground.traffic.allowed_frames
    probes = [frames.syn(ip_address(source).packed) for _ in range(3)]
    for probe in probes:
        frames.send(probe.frame)
        time.sleep(0.05)  # pause: the pace of the sender
    return probes[-1].sequence in ground.traffic.seen


def _expect(ground: Ground, source: str, want: bool, what: str) -> None:
    until(lambda: _passes(ground, source) == want, what)
