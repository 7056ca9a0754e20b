"""The whole daemon on a fake kernel, without root: its start, its jobs, its signals and its end.

Its workers are not processes, and a test names its interfaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import pytest

from portward.base import netns
from portward.base.clock import Clock
from portward.cli.status_text import lines as status_lines
from portward.config.keys import QueueReader
from portward.config.load import load_config
from portward.daemon import composition, config_reload, health, store_watch
from portward.daemon.composition import Daemon, missing
from portward.daemon.core import Core
from portward.daemon.counting import Counting
from portward.daemon.intake import Intake
from portward.daemon.metrics import FAMILIES
from portward.daemon.runtime import age_of, read_status
from portward.daemon.runtime import running as process_of
from portward.daemon.steps import StepRunner
from portward.daemon.store_watch import StoreWatch
from portward.daemon.workers import Worker
from portward.dataplane import namespacelock
from portward.dataplane.links import Links
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.names import TABLE
from portward.dataplane.namespacelock import LOCK_TABLE, NamespaceLock, NamespaceTakenError
from portward.dataplane.plane import Dataplane
from portward.errors import KernelError, PortwardError
from portward.ipc.counters import WorkerEvent
from portward.table.database import TableError
from unit.daemon.test_core import LINKS, MAY, Ground, subscription

SECONDS = 60.0
CHANGES = 100


def shown_lines(status: dict[str, Any]) -> list[str]:
    """The lines of `portward status`."""
    return status_lines(status, age_of(status))


class FakeWorker(Worker):
    """A worker without a process. It records the calls."""

    def __init__(self, ground: Running) -> None:
        super().__init__(0, 16, QueueReader.BATCH, ground.config.table, lambda source: None)
        self._ground = ground

    @property
    def running(self) -> bool:
        """Whether the worker's queue is bound."""
        return self.ready

    async def prepare(self) -> None:
        """Nothing is loaded."""
        self._ground.said.append("worker prepared")

    async def start(self) -> None:
        """Binds at once."""
        self._ground.said.append("worker bound")
        self.ready = True

    async def watch(self) -> None:
        """Starts it again after it was ended."""
        while True:
            await asyncio.sleep(0.01)  # pause: of a poll
            if not self.ready:
                self.restarts += 1
                await self.start()

    async def stop(self) -> None:
        """Ends it."""
        self._ground.said.append("worker stopped")

    def kill(self) -> None:
        """Ends it by force."""
        self._ground.said.append("worker killed")
        self.ready = self.answers = False


class Notices:
    """A descriptor that a test makes readable."""

    def __init__(self) -> None:
        self._theirs, self._ours = os.pipe()
        os.set_blocking(self._theirs, False)

    def fileno(self) -> int:
        """The watched descriptor."""
        return self._theirs

    def read(self) -> RulesetChanges:
        """Reads all."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._theirs, 4096)
            return RulesetChanges(ours=True, others=True)
        return RulesetChanges()

    def wake(self) -> None:
        """Reports a change of the rules."""
        os.write(self._ours, b"x")

    def close(self) -> None:
        """Closes both ends."""
        os.close(self._theirs)
        os.close(self._ours)


class Running(Ground):
    """A daemon that runs in the test's own loop."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        self.core.close()
        self.said: list[str] = []
        self.path = folder / "portward.toml"
        self.settings: dict[str, Any] = {
            "segments": ["vni*"], "uplinks": ["up0"], "store": self.config.store, "table": str(self.config.table),
            "metrics": {"address": ""},
        }  # fmt: skip
        self.configure()
        self.links: asyncio.Queue[Links]
        self.daemon: Daemon
        self.worker = FakeWorker(self)
        self.instance: str | None = None
        # If true, the worker does not answer queries.
        self.silent = False
        self.notices = Notices()
        self._patch(monkeypatch)

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def follow() -> AsyncIterator[Links]:
            yield LINKS
            while True:
                yield await self.links.get()

        def ask(_: object, place: int, port: int) -> None:
            assert (place, port) == (0, 25)
            if not self.silent and TABLE in self.kernel.tables:  # without rules no query gets to a worker
                self.worker.counters.event(WorkerEvent.PROBED)
                self.kernel.tables[TABLE].counters["answered"] += 1

        monkeypatch.setattr("portward.dataplane.rtnetlink.follow", follow)
        monkeypatch.setattr("portward.daemon.workers.make", lambda *_: [self.worker])
        monkeypatch.setattr("portward.ipc.probe.Prober.__init__", lambda _: None)
        monkeypatch.setattr("portward.ipc.probe.Prober.close", lambda _: None)
        monkeypatch.setattr("portward.ipc.probe.Prober.ask", ask)
        monkeypatch.setattr("portward.daemon.runtime.faulthandler.enable", lambda _: None)
        monkeypatch.setattr(namespacelock, "NfNetlink", self.kernel.netlink)
        monkeypatch.setattr(
            composition,
            "hearing",
            lambda _, notice_filter=None: self.notices if notice_filter is None else Notices(),
        )
        for module in (composition, config_reload):
            monkeypatch.setattr(module, "notify", lambda *words: self.said.extend(words))

    def configure(self, **settings: Any) -> None:
        """Writes portward.toml."""
        self.path.write_bytes(msgspec.toml.encode({**self.settings, **settings}))

    def run(self, work: Callable[[], Awaitable[None]] | None = None) -> None:
        """Runs the daemon, does `work` while it enforces, and then ends it by SIGTERM. Raises what the daemon
        raises."""

        async def both() -> None:
            self.links = asyncio.Queue()
            self.daemon = Daemon(self.path, load_config(self.path), self.instance)
            running = asyncio.create_task(self.daemon.run())
            if work is not None:
                try:
                    await self.until(lambda: running.done() or "READY=1" in self.said, "it is ready")
                    if not running.done():
                        await work()
                finally:
                    if not running.done():
                        os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(SECONDS):
                await running

        asyncio.run(both())

    def number(self, metric: str, *labels: str) -> float:
        """The number of a metric in a scrape now."""
        [family] = [family for family in FAMILIES if family.name == metric]
        return family.numbers(self.daemon._newest())[labels]

    @staticmethod
    async def until(true: Callable[[], bool], what: str) -> None:
        """Waits until `true()` is true."""
        try:
            async with asyncio.timeout(SECONDS):
                while not true():
                    await asyncio.sleep(0.01)  # pause: of a poll
        except TimeoutError:
            raise AssertionError(f"not within {SECONDS:.0f} s: {what}") from None


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A daemon that is not started."""
    found = Running(tmp_path, monkeypatch)
    yield found
    os.close(found.worker._block)


def enforced(running: Running) -> bool:
    """Whether the ruleset is there."""
    return TABLE in running.kernel.tables and bool(running.kernel.tables[TABLE].chains["screen"].rules)


def test_a_start_takes_the_lock_first_and_loads_the_ruleset_when_the_queues_are_bound(running: Running) -> None:
    written: list[str] = []
    real = running.worker.start

    async def start() -> None:
        written.extend(running.kernel.tables)
        await real()

    running.worker.start = start  # type: ignore[method-assign]

    async def work() -> None:
        assert enforced(running)

    running.run(work)
    assert written == [LOCK_TABLE], "the lock, and no rules yet"
    assert running.said[:3] == ["worker prepared", "worker bound", "READY=1"]
    assert running.said[-2:] == ["STOPPING=1", "worker stopped"]
    assert set(running.kernel.tables) == {TABLE}, "the ruleset stays, the lock goes"


def test_a_stop_waits_for_no_worker_that_does_not_start(running: Running) -> None:
    async def start() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    running.worker.start = start  # type: ignore[method-assign]
    running.run()
    assert running.said == ["worker prepared", "worker stopped"]
    assert not running.kernel.tables, "neither rules nor the lock"


def test_a_second_agent_is_refused_before_it_writes_anything(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespacelock.NamespaceLock.__init__, "__defaults__", (0.0,))
    with NamespaceLock():
        before = running.kernel.state()
        with pytest.raises(NamespaceTakenError):
            running.run()
        assert running.kernel.state() == before
    assert "worker prepared" not in running.said


@pytest.mark.parametrize("what", ["the ruleset", "the queue", "the store"])
def test_what_fails_before_the_end_of_a_start_leaves_the_kernel_as_it_was(running: Running, what: str) -> None:
    if what == "the ruleset":
        running.kernel.refuse(errno.ENOMEM, after=1)  # the first one is the lock
    elif what == "the store":
        (running.folder / "portward.db").unlink()
        for file in running.config.table.iterdir():
            file.unlink()
    else:

        async def start() -> None:
            raise KernelError("queue 0 cannot be bound")

        running.worker.start = start  # type: ignore[method-assign]
    with pytest.raises(PortwardError):
        running.run()
    assert not running.kernel.tables, "neither rules nor the lock"
    assert "READY=1" not in running.said
    assert "worker stopped" in running.said


def test_a_stop_leaves_the_ruleset_and_the_next_agent_keeps_what_is_cached(running: Running) -> None:
    async def work() -> None:
        running.kernel.learn("allow4", b"\3\0\0\0\n\0\0\4")

    running.run(work)
    assert enforced(running)
    again = len(running.kernel.journal)
    running.said.clear()
    running.notices = Notices()

    async def nothing() -> None:
        assert len(running.cached()) == 1

    running.run(nothing)
    assert len(running.kernel.journal) > again


def test_a_start_ends_if_the_namespace_loses_its_name_meanwhile(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.instance = "blue"
    own = ["blue"]
    monkeypatch.setattr(netns, "is_own", lambda name: name in own)

    async def start() -> None:
        own.clear()
        await asyncio.Event().wait()

    running.worker.start = start  # type: ignore[method-assign]
    with pytest.raises(PortwardError, match="network namespace 'blue' was removed or made anew"):
        running.run()
    assert running.said == ["worker prepared", "worker stopped"]
    assert not running.kernel.tables, "neither rules nor the lock"


def test_an_agent_whose_namespace_has_lost_its_name_ends_and_leaves_its_rules(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another namespace may have the name by now, and the next agent starts there."""
    running.instance = "blue"
    own = ["blue"]
    monkeypatch.setattr(netns, "is_own", lambda name: name in own)

    async def work() -> None:
        own.clear()
        await running.until(lambda: "STOPPING=1" in running.said, "it ends")

    with pytest.raises(PortwardError, match="network namespace 'blue' was removed or made anew"):
        running.run(work)
    assert enforced(running)
    assert LOCK_TABLE not in running.kernel.tables


def test_a_change_of_the_store_is_enforced(running: Running) -> None:
    async def work() -> None:
        running.kernel.learn("allow4", b"\3\0\0\0\n\0\0\4")
        running.put(subscription(MAY, "pay-as-you-go"))
        await running.until(lambda: not running.cached(), "the verdict is forgotten")

    running.run(work)


def test_rules_that_another_program_took_are_put_back_at_the_kernels_notice(running: Running) -> None:
    async def work() -> None:
        running.kernel.load("flush ruleset")
        running.notices.wake()
        await running.until(lambda: enforced(running), "the rules are back")
        assert LOCK_TABLE in running.kernel.tables

    running.run(work)


def test_without_a_notice_they_are_put_back_all_the_same(running: Running) -> None:
    async def work() -> None:
        running.kernel.load("flush ruleset")
        await running.until(lambda: enforced(running), "the rules are back")

    running.run(work)


def test_an_interface_that_goes_takes_its_verdicts_with_it(running: Running) -> None:
    async def work() -> None:
        running.kernel.learn("allow4", b"\3\0\0\0\n\0\0\4")
        running.links.put_nowait(Links({4: "vni2", 9: "up0"}, frozenset({3})))
        await running.until(lambda: not running.cached(), "the verdicts behind it are forgotten")

    running.run(work)


def test_a_configuration_is_read_again_and_a_bad_one_refused(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    async def reload() -> None:
        before = running.said.count("READY=1")
        os.kill(os.getpid(), signal.SIGHUP)
        await running.until(lambda: running.said.count("READY=1") > before, "it was read")

    async def work() -> None:
        running.configure(preset="aws")
        await reload()
        assert "read again and in force" in caplog.text
        for bad, why in (
            ({"preset": "nonsense"}, "nonsense"),
            ({"segments": 3}, "segments"),
            ({"queue": {"first": 5}}, "queue cannot change while portward runs"),
        ):
            caplog.clear()
            running.configure(**bad)
            await reload()
            assert "the configuration before stays in force" in caplog.text
            assert why in caplog.text
        assert enforced(running)

    with caplog.at_level(logging.INFO):
        running.run(work)


def test_a_worker_that_does_not_answer_is_ended_and_started_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "ANSWER_TIMEOUT_S", 0.05)

    async def work() -> None:
        await running.until(lambda: _answered(running) > 0, "it has answered")
        running.silent = True
        await running.until(lambda: running.worker.restarts > 0, "it is started again")
        running.silent = False
        before = _answered(running)
        # The two clock readings of a status are some microseconds apart.
        await running.until(lambda: _answered(running) > before + 0.05, "and answers")

    running.run(work)
    assert "worker killed" in running.said


@pytest.mark.parametrize("lane", ["policy", "kernel", "counting"])
def test_the_watchdog_is_not_fed_while_a_thread_hangs(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lane: str
) -> None:
    """Meanwhile the workers answer from the table of the last run."""
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setattr("portward.base.heartbeat.QUICK_S", 0.3)
    monkeypatch.setattr("portward.base.heartbeat.SLOW_S", 0.3)
    fed: list[str] = []
    monkeypatch.setattr(health, "notify", lambda *words: fed.extend(words))

    async def work() -> None:
        await running.until(lambda: "WATCHDOG=1" in fed, "it is fed")
        await running.until(lambda: math.isfinite(running.number("counters_age_seconds")), "it has counted")
        free = threading.Event()
        threads = running.daemon._threads
        hanging = asyncio.ensure_future(getattr(threads, lane)(free.wait))
        try:
            await running.until(lambda: bool(threads.heartbeat.stuck()), "the thread is stuck")
            await asyncio.sleep(0.2)  # pause: lets a round end that had begun before
            fed.clear()
            await asyncio.sleep(0.5)  # pause: the watchdog could be fed within this time
            assert fed == []
            assert running.number("thread_step_seconds", lane) > 0.3
            if lane == "counting":
                assert running.number("counters_age_seconds") > 0.3
            if lane != "counting":  # it writes the status; without it that says how old it is
                await running.until(lambda: _says_stuck(running, lane), "the status says so")
        finally:
            free.set()
        await hanging
        await running.until(lambda: "WATCHDOG=1" in fed, "it is fed again")

    running.run(work)
    if lane != "counting":  # then the round itself waits
        assert f"the {lane} thread has been at one step" in caplog.text


def _answered(running: Running) -> float:
    """When every worker last answered, by the status (monotonic, s); 0 if none has."""
    status = read_status(running.config.table)
    if status is None or status["self_check"]["age"] is None:
        return 0.0
    return float(status["clock"]["seconds"] - status["self_check"]["age"])


def test_a_worker_that_is_tried_again_does_not_run(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has bound its queue but answers nothing does not feed it either."""

    def states() -> list[str]:
        found = read_status(running.config.table) or {"workers": []}
        return [worker["state"] for worker in found["workers"]]

    async def work() -> None:
        await running.until(lambda: states() == ["answers"], "it answers")
        lines = shown_lines(read_status(running.config.table) or {})
        assert any("worker 0 runs" in line for line in lines)
        monkeypatch.setattr(health, "ANSWER_TIMEOUT_S", 0.05)
        free = asyncio.Event()

        async def start() -> None:
            running.worker.trouble = "queue 0 cannot be bound: another process has it"
            await free.wait()
            running.worker.ready, running.worker.trouble = True, ""

        running.worker.start = start  # type: ignore[method-assign]
        running.silent = True
        await running.until(lambda: states() == ["trying"], "it is tried again")
        line = next(line for line in shown_lines(read_status(running.config.table) or {}) if "worker 0" in line)
        assert "worker 0 IS DOWN for " in line
        assert "queue 0 cannot be bound: another process has it" in line
        free.set()
        await running.until(lambda: states() == ["unanswered"], "it has bound its queue, and does not answer")
        running.silent = False

    running.run(work)


def test_a_revision_that_the_kernel_refuses_is_not_enforced_and_the_status_says_so(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> dict[str, Any]:
        return read_status(running.config.table) or {}

    async def work() -> None:
        await running.until(lambda: told().get("enforced_revision") == 1, "the first one is enforced")
        running.kernel.permitted = False
        running.put(subscription(MAY, "pay-as-you-go"))
        await running.until(lambda: told()["revision"] == 2 and told()["ruleset_error"], "the kernel refuses it")
        assert running.number("enforced_revision") == 1
        assert told()["enforced_revision"] == 1
        lines = shown_lines(told())
        assert any(
            "revision 2 in the table, NOT enforced yet: the kernel acts on revision 1" in line for line in lines
        )
        assert "revision 2 is NOT enforced" in caplog.text
        running.kernel.permitted = True
        await running.until(lambda: told()["enforced_revision"] == 2, "it takes it")

    running.run(work)


def test_the_status_says_what_is_enforced_and_goes_with_the_daemon(running: Running) -> None:
    found: dict[str, Any] = {}

    async def work() -> None:
        await running.until(lambda: read_status(running.config.table) is not None, "it is written")
        found.update(read_status(running.config.table) or {})

    running.run(work)
    assert found["revision"] == 1
    assert {segment["name"] for segment in found["segments"]} == {"vni1", "vni2"}
    assert found["ruleset_error"] == ""
    assert read_status(running.config.table) is None


def test_interfaces_that_are_not_there_are_named(running: Running) -> None:
    links = Links({9: "up0"}, frozenset())
    assert missing(running.config, links) == ["segments: no interface 'vni*' is there now"]
    assert missing(running.config, LINKS) == []


class Churning:
    """A core whose store always has a new change, with a grant that has ended and interfaces that are not written.
    It counts the calls."""

    def __init__(self, enough: asyncio.Event) -> None:
        self.clock, self.done, self._enough = Clock(None), Counter[str](), enough
        self.ended = self.clock.now()
        self.links_failed = True
        self.intake = self

    def store_descriptor(self) -> None:
        """None, because the store has no descriptor."""

    def sync(self) -> bool:
        """Takes a change."""
        self.done["sync"] += 1
        if self.done["sync"] == CHANGES:
            self._enough.set()
        return True

    def next_expiry(self) -> datetime:
        """The end of the grant, which cannot be written."""
        return self.ended

    def decide_due(self) -> None:
        """Fails."""
        self.done["decide_due"] += 1

    def retry_links(self) -> None:
        """Fails as well."""
        self.done["retry_links"] += 1


def test_a_store_that_always_has_another_change_keeps_no_grant_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interfaces are written, too. A failed step is retried after a pause, not after each change."""
    monkeypatch.setattr(store_watch, "_POLL_S", 3600.0)
    monkeypatch.setattr(store_watch, "readable", lambda *_: asyncio.sleep(0))  # the store has notified

    async def follow() -> Counter[str]:
        enough = asyncio.Event()
        core = cast("Any", Churning(enough))

        async def step(work: Callable[[], Any]) -> Any:
            await asyncio.sleep(0)
            return work()

        reading: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        reading.set_result(None)
        following = asyncio.create_task(StoreWatch(core, step, StepRunner()).run(reading))
        async with asyncio.timeout(SECONDS):
            await enough.wait()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        return cast("Counter[str]", core.done)

    assert asyncio.run(follow()) == {"sync": CHANGES, "decide_due": 1, "retry_links": 1}


class Held:
    """A step of the core that does not end until the test lets it."""

    def __init__(self) -> None:
        self.entered, self.free = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.free.wait(SECONDS), "the test lets it go"


# Thread → one of its steps: the part of the core that has it, and its name.
STEPS: Final[dict[str, tuple[type, str]]] = {
    "policy": (Intake, "links_changed"), "kernel": (Dataplane, "check"), "counting": (Counting, "screen"),
}  # fmt: skip


@pytest.fixture
def held(running: Running) -> Iterator[Held]:
    """A step that a test can hold. At the end it goes on, and the locks of an abandoned daemon are closed."""
    found = Held()
    yield found
    found.free.set()
    for thread in running.daemon._threads.all:
        thread.shutdown()
    running.daemon._locks.close()


async def take(running: Running, held: Held, thread: str) -> None:
    """Makes the daemon run a step that is held."""
    if thread == "policy":
        running.links.put_nowait(Links({4: "vni2", 9: "up0"}, frozenset({3})))
    elif thread == "kernel":
        running.kernel.load("flush ruleset")
        running.notices.wake()
    await running.until(held.entered.is_set, f"the {thread} thread is at the step")


def locked(running: Running) -> tuple[bool, bool]:
    """Whether the namespace, and the table folder, are closed to another agent."""
    return LOCK_TABLE in running.kernel.tables, process_of(running.config.table) is not None


class FaultError(TableError):
    """The policy table cannot be read. This error of a step ends the agent at once."""


def fail(*_: object) -> None:
    """Raises an unexpected error."""
    raise FaultError


@pytest.mark.parametrize("thread", STEPS)
@pytest.mark.parametrize("failed", [True, False], ids=["a job failed", "SIGTERM"])
def test_the_locks_stay_if_a_thread_is_still_at_work(
    running: Running, held: Held, monkeypatch: pytest.MonkeyPatch, thread: str, failed: bool
) -> None:
    """The thread may write kernel and table until the process is gone, so no other agent may start before."""
    part, name = STEPS[thread]
    monkeypatch.setattr(part, name, held)
    fault = asyncio.Event()

    async def watch() -> None:
        await fault.wait()
        raise FaultError

    running.worker.watch = watch  # type: ignore[method-assign]

    async def work() -> None:
        await take(running, held, thread)
        if failed:
            fault.set()
            await running.until(lambda: "STOPPING=1" in running.said, "it ends")

    with pytest.raises(FaultError) if failed else contextlib.nullcontext():
        running.run(work)
    assert not held.free.is_set()
    assert running.daemon.abandoned
    assert locked(running) == (True, True)
    assert "worker stopped" in running.said


@pytest.mark.parametrize("thread", STEPS)
def test_a_step_that_ends_in_time_ends_before_the_locks(
    running: Running, held: Held, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    found: list[tuple[bool, bool]] = []

    def step(*arguments: object) -> None:
        held(*arguments)
        found.append(locked(running))

    part, name = STEPS[thread]
    monkeypatch.setattr(part, name, step)
    monkeypatch.setattr(Intake, "stop", lambda _: held.free.set())
    running.run(lambda: take(running, held, thread))
    assert set(found) == {(True, True)}
    assert not running.daemon.abandoned
    assert locked(running) == (False, False)


def test_a_stop_does_not_wait_for_what_the_last_step_of_a_change_hands_to_the_kernel_thread(
    running: Running, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = threading.Event()

    def links_changed(intake: Intake, *_: object) -> bool:
        held.entered.set()
        assert stopping.wait(SECONDS)
        intake._on_kernel(held)
        return True

    monkeypatch.setattr(Intake, "links_changed", links_changed)
    monkeypatch.setattr(Intake, "stop", lambda _: stopping.set())
    running.run(lambda: take(running, held, "policy"))
    assert running.daemon.abandoned
    assert locked(running) == (True, True)


@pytest.mark.parametrize("step", ["__init__", "first_policy", "first_links", "_first_sync", "load"])
def test_a_stop_waits_for_no_step_of_a_start(
    running: Running, held: Held, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(composition, "_FIRST_READING_S", 2 * SECONDS)
    owner = {"_first_sync": Daemon, "first_policy": Intake}.get(step, Core)
    monkeypatch.setattr(owner, step, held)

    async def stop() -> None:
        running.links = asyncio.Queue()
        running.daemon = Daemon(running.path, load_config(running.path))
        ending = asyncio.create_task(running.daemon.run())
        await running.until(held.entered.is_set, "the start is at the step")
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(SECONDS / 2):
            await ending

    asyncio.run(stop())
    assert not held.free.is_set()
    assert running.daemon.abandoned
    assert locked(running) == (True, True)
    assert "READY=1" not in running.said


def test_rules_are_kept_and_interfaces_followed_while_a_start_waits_for_the_store(
    running: Running, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composition, "_FIRST_READING_S", 2 * SECONDS)
    monkeypatch.setattr(Daemon, "_first_sync", held)

    async def work() -> None:
        running.links = asyncio.Queue()
        running.daemon = Daemon(running.path, load_config(running.path))
        ending = asyncio.create_task(running.daemon.run())
        await running.until(lambda: held.entered.is_set() and enforced(running), "the rules are loaded")
        running.kernel.load("flush ruleset")
        await running.until(lambda: enforced(running), "the rules are back")
        running.links.put_nowait(Links({4: "vni2", 9: "up0"}, frozenset({3})))
        await running.until(
            lambda: bool(running.kernel.tables[TABLE].sets["unsettled"].elements), "the interface is unsettled"
        )
        assert "READY=1" not in running.said
        held.free.set()
        await running.until(lambda: "READY=1" in running.said, "it is ready")
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(SECONDS):
            await ending

    asyncio.run(work())


def test_a_start_that_fails_beside_a_thread_leaves_the_locks(
    running: Running, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Daemon, "_first_sync", held)

    async def start() -> None:
        await running.until(held.entered.is_set, "the policy thread is at the step")
        raise KernelError("queue 0 cannot be bound")

    running.worker.start = start  # type: ignore[method-assign]
    with pytest.raises(KernelError, match="queue 0"):
        running.run()
    assert running.daemon.abandoned
    assert locked(running) == (True, True)


def test_an_error_while_it_ends_leaves_the_locks(
    running: Running, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dataplane, "check", held)
    monkeypatch.setattr(Intake, "stop", fail)
    with pytest.raises(FaultError):
        running.run(lambda: take(running, held, "kernel"))
    assert running.daemon.abandoned
    assert locked(running) == (True, True)


def test_a_job_that_does_not_end_keeps_no_stop_waiting(running: Running) -> None:
    """Once another agent may write to the kernel, that job no longer does."""
    late: list[Exception] = []

    async def watch() -> None:
        while not late:
            try:
                await asyncio.sleep(SECONDS)  # pause: a job without an end
            except asyncio.CancelledError:
                with contextlib.suppress(asyncio.CancelledError):
                    await running.until(lambda: "worker stopped" in running.said, "the workers have ended")
                try:
                    await running.daemon._kernel_step(lambda: None)
                except RuntimeError as error:
                    late.append(error)

    async def nothing() -> None:
        """Ready is enough."""

    running.worker.watch = watch  # type: ignore[method-assign]
    running.run(nothing)
    assert late
    assert not running.daemon.abandoned
    assert locked(running) == (False, False)


def _says_stuck(running: Running, lane: str) -> bool:
    """Whether the status begins with the thread that hangs."""
    return shown_lines(read_status(running.config.table) or {})[0].startswith(
        f"STUCK     the {lane} thread has been at"
    )


# --- the process ---


class Ended(Exception):  # noqa: N818 # no error: the end of the process
    """The process has ended at once, without its threads."""


@pytest.fixture
def process(running: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[BaseException | None]]:
    """Runs the process of a daemon that raises `error`, and may leave a thread at work. Returns what it ends with
    at once; nothing if it ends as usual."""

    def run(error: Exception | None = None, *, abandoned: bool = False) -> list[BaseException | None]:
        ended: list[BaseException | None] = []

        async def life(daemon: Daemon) -> None:
            daemon.abandoned = abandoned
            if error is not None:
                raise error

        def exit_now(with_: BaseException | None) -> None:
            ended.append(with_)
            raise Ended

        monkeypatch.setattr(Daemon, "run", life)
        monkeypatch.setattr("portward.daemon.composition.shutdown.exit_now", exit_now)
        monkeypatch.setattr("portward.daemon.composition.sys.setswitchinterval", lambda _: None)
        monkeypatch.setattr("portward.daemon.composition.os.umask", lambda mask: running.said.append(f"{mask:o}"))
        monkeypatch.setattr("portward.daemon.composition.logging.basicConfig", lambda **_: None)
        with contextlib.suppress(Ended):
            composition.run(running.path)
        return ended

    return run


@pytest.mark.parametrize(("limit", "warned"), [(1023, True), (1024, False)])
def test_a_process_with_few_descriptors_warns_and_runs(
    running: Running,
    process: Callable[..., list[BaseException | None]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limit: int,
    warned: bool,
) -> None:
    """The files that it makes are readable only for its own user."""
    monkeypatch.setattr("portward.daemon.composition.descriptors.raise_limit", lambda: limit)
    assert process() == []
    assert ("file descriptors" in caplog.text) == warned
    assert running.said == ["77"]


def test_a_process_whose_thread_is_at_work_ends_at_once_with_its_error(
    process: Callable[..., list[BaseException | None]],
) -> None:
    """Python's own exit would wait for the thread. Without such a thread the error goes to the caller."""
    error = KernelError("queue 0 cannot be bound")
    assert process(error, abandoned=True) == [error]
    assert process(abandoned=True) == [None]
    with pytest.raises(KernelError, match="queue 0"):
        process(error)
