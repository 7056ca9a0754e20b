"""The daemon, and the only composition root: workers, core, links, metrics and signals, wired together.

    policy thread    store, links, time ─► Writer (decide) ─┐
    kernel thread    Enforcement (epoch, then forget) ◄──────┘   ruleset changed by others ─► repair
    counting thread  what the kernel has counted

These are the steps of `Core`. The asyncio loop beside them only waits: for sockets, processes, signals and time.
Stopping (SIGTERM) leaves ruleset and cached verdicts in the kernel: nothing opens. The locks of table folder and
network namespace are held as long as a thread may write: if one does not end in time, until the process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from portward.base import clock, descriptors
from portward.base.interfaces import matches
from portward.config.keys import Config
from portward.config.load import load_config
from portward.daemon import settings, shutdown, workers
from portward.daemon.core import Core
from portward.daemon.health import HealthCheck
from portward.daemon.linkfeed import LinkFeed, followed
from portward.daemon.metrics import FAMILIES, MetricsCollector
from portward.daemon.periodic import LimitRequests, PeriodicJobs
from portward.daemon.ruleset_watch import RulesetWatch
from portward.daemon.runtime import Runtime
from portward.daemon.status import status
from portward.daemon.steps import Step, StepRunner
from portward.daemon.systemd import log_formatter, notify
from portward.daemon.threads import Threads
from portward.daemon.timers import readable, until_tick
from portward.daemon.workers import Worker
from portward.dataplane.links import Links
from portward.dataplane.monitor import NoticeFilter
from portward.dataplane.namespacelock import NamespaceLock
from portward.dataplane.reconciler import hearing
from portward.errors import PortwardError
from portward.metrics.family import Snapshot
from portward.metrics.server import MetricsServer
from portward.policy import presets
from portward.policy.preset import Preset
from portward.store.flips import HeldError
from portward.table.database import put_aside

# What is done again and again is done at the same moments: a process that wakes finds its caches cold, and what it
# does then costs several times as much as when it is awake already.
_STATUS_SECONDS: Final = 1.0
# The store's bell wakes at once; the poll is for a store that changed without it, or came back.
_POLL_SECONDS: Final = 1.0
_SWITCH_SECONDS: Final = 0.0005
# How long READY may wait for what the store changed while no agent ran, in seconds. A store that is locked or a
# bulk change must not keep a gateway from starting; it enforces the last known policy until then.
_FIRST_READING: Final = 1.0
# How long a stop waits for the jobs, and then for the threads, in seconds. What takes longer (a bulk change, a
# kernel that is busy) is abandoned with the process: SQLite, LMDB and nftables keep the state before.
_STOP_SECONDS: Final = 1.0
# After this many seconds at one step the policy thread is reported in the log, then each time it has doubled.
_SLOW_SECONDS: Final = 10.0
# Changes of these take another process: sockets and files are opened at the start.

_log = logging.getLogger("portward")


class Daemon:
    """One running gateway."""

    def __init__(self, path: Path, config: Config) -> None:
        """`path` is where `config` was read, and is read again on SIGHUP."""
        self._path, self._config = path, config
        self._threads = Threads()
        self._policy_step, self._kernel_step = self._threads.policy, self._threads.kernel
        self._count_step = self._threads.counting
        self._stopping = asyncio.Event()
        self._reload = asyncio.Event()
        self._reload_failed = False
        self._slow = _SLOW_SECONDS
        # Whether a thread may still be at work: then the process must end without waiting for it.
        self.abandoned = False
        # The locks that keep other agents away.
        self._locks = contextlib.ExitStack()
        self._began = clock.monotonic()
        self._core: Core
        self._metrics: MetricsServer
        self._collector: MetricsCollector
        self._opened = False
        self._workers: list[Worker] = []
        self._limit_requests = LimitRequests()
        self._steps = StepRunner()

    async def run(self) -> None:
        """Runs until SIGTERM or SIGINT. Raises PortwardError where the gateway cannot begin; then nothing has
        been loaded. If `abandoned` then, the locks are still held."""
        # First of all: a signal that comes while the gateway starts must not end it half-way.
        self._catch_signals()
        async with contextlib.AsyncExitStack() as stack:
            # What ends the gateway, last things first. All of it stands here before anything begins, so an error
            # or a signal at any step ends it in this order.
            stack.callback(self._threads.close)
            stack.callback(self._release)
            stack.push_async_callback(lambda: workers.stop(self._workers))
            stack.push_async_callback(self._close)
            # Until `_close` has seen all threads end: an error on the way there leaves it so.
            self.abandoned = True
            starting = asyncio.ensure_future(self._start(stack))
            if await self._stopped_before(starting):
                return
            await self._serve(*starting.result())
        _log.info("stopped; the ruleset stays in force, and cached verdicts until they end")

    async def _start(
        self, stack: contextlib.AsyncExitStack
    ) -> tuple[AsyncIterator[Links], Links, asyncio.Future[None]]:
        """Loads the ruleset: from then on it has to be kept, and interfaces followed. Gives those to follow, those
        that the table has, and the first reading of the store, which may still go on."""
        links = await self._open(stack)
        await self._policy_step(self._core.first_policy)
        first = await anext(links)
        await self._policy_step(lambda: self._core.first_links(first))
        # While the workers load their libraries.
        reading = asyncio.ensure_future(
            self._steps.run(Step.STORE, lambda: self._policy_step(self._first_sync), None)
        )
        await asyncio.gather(self._kernel_step(self._core.prepare), *(worker.start() for worker in self._workers))
        await self._kernel_step(self._core.load)
        settings.leave(self._path, self._core.config, self._core.preset)
        # Not before the gateway enforces, which depends on no address.
        stack.callback(self._metrics.close)
        self._metrics.start()
        return links, first, reading

    async def _open(self, stack: contextlib.AsyncExitStack) -> AsyncIterator[Links]:
        """Takes all that another process could have: the locks of table folder and network namespace, the kernel's
        queues. Gives the interfaces to follow."""
        runtime = Runtime(self._config.table)
        self._locks.callback(runtime.close)
        self._runtime = runtime
        settings.forget(self._config.table)
        if runtime.crashed:
            _log.error("portward crashed the last time: %s", runtime.crashed)
        # Before anything is written: a second agent here would take this one's rules away, and this one would put
        # them back, for ever.
        await self._kernel_step(lambda: self._locks.callback(NamespaceLock().close))
        if runtime.table_cut_off:
            put_aside(self._config.table, f"{self._config.table}: the policy table was cut off")
        preset = presets.load(self._config.preset, named_in=self._path)
        self._workers = workers.make(self._config.queue, self._config.table, self._limit_requests.add)
        for worker in self._workers:
            await worker.prepare()
        opening = asyncio.ensure_future(self._kernel_step(lambda: self._open_core(preset)))
        # The library behind the metrics takes longer to load than all else of the daemon. Meanwhile the workers'
        # processes load theirs, and the core asks the kernel.
        from portward.dataplane import rtnetlink  # noqa: PLC0415 # as said above
        from portward.metrics.exporter import scrape_handler  # noqa: PLC0415 # as said above

        await opening
        await self._count_step(lambda: None)  # no thread begins later, when there may be none
        answer = scrape_handler(FAMILIES, self._newest)
        self._metrics = MetricsServer(self._config.metrics_endpoints(), answer)
        self._collector = MetricsCollector(
            self._core, self._workers, self._metrics, self._steps, self._threads.heartbeat
        )
        self._follow_links = rtnetlink.follow
        return await stack.enter_async_context(contextlib.aclosing(rtnetlink.follow()))

    def _open_core(self, preset: Preset) -> None:
        """Kernel thread: there `_close_core` finds it, also if nothing waits for it any more."""
        self._core = Core(self._config, preset, self._threads.on_kernel)
        self._opened = True

    def _close_core(self) -> None:
        if self._opened:
            self._core.close()

    async def _close(self) -> None:
        """Ends the threads, and closes what they use once none of them is at work."""
        nothing: Callable[[], None] = lambda: None  # noqa: E731 # typed
        if self._opened:
            self._core.stop()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                policy, counting = nothing, nothing
                if self._opened:
                    policy, counting = self._core.close_store, self._core.close_counts
                await self._threads.end(policy, counting, self._close_core)
        except TimeoutError:
            work = self._core.work if self._opened else None
            _log.info("stopped in the midst of %s", "a step" if work is None else work.what)
        else:
            self.abandoned = False

    def _release(self) -> None:
        """Lets other agents in. Not while a thread may write: the kernel ends both locks with the process."""
        if not self.abandoned:
            self._locks.close()

    async def _stopped_before(self, work: Awaitable[object]) -> bool:
        """Waits for `work`, or for a signal to stop; True if that came first."""
        working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            working.result()
            return False
        # It waits for no process any more. A step that a thread is at goes on; what `work` raises is ignored.
        await shutdown.cancelled({working}, _STOP_SECONDS)
        return True

    def _first_sync(self) -> None:
        """Takes in what the store has changed while no agent ran. Policy thread."""
        until = time.monotonic() + _FIRST_READING
        while self._core.sync() and time.monotonic() < until:
            pass

    async def _become_ready(self, reading: asyncio.Future[None], first: Links) -> None:
        """Says READY once what `reading` takes in is enforced, or after `_FIRST_READING` seconds. Returns when
        `reading` has ended."""
        await asyncio.wait({reading}, timeout=_FIRST_READING)
        if reading.done():
            # Behind the changes that it has handed over.
            await self._kernel_step(lambda: None)
        else:
            _log.warning(
                "the store has not been read within %g s: the policy of the last run is in force until it is",
                _FIRST_READING,
            )
        self._tell_ready(first)
        await reading

    def _newest(self) -> Snapshot:
        """The metrics of the last second. Any thread."""
        return self._collector.newest()

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)

    async def _serve(self, links: AsyncIterator[Links], first: Links, reading: asyncio.Future[None]) -> None:
        feed = LinkFeed(self._core, self._threads, self._steps, first)
        periodic = PeriodicJobs(self._core, self._threads, self._steps, self._limit_requests)
        health = HealthCheck(
            self._core, self._workers, self._count_step, self._threads.heartbeat.stuck, self._steps
        )
        ready = asyncio.ensure_future(self._become_ready(reading, first))
        changes = followed(links, self._follow_links, self._steps)
        # What fails in a job outside of its steps counts as the one that must not stand still.
        jobs = [
            asyncio.create_task(self._steps.keep_running(step, job))
            for step, job in (
                (Step.SETTLE, lambda: self._follow_store(ready)),
                (Step.OWNERS, lambda: feed.follow(changes)),
                (Step.DEVICES, feed.see),
                (Step.LINKS, feed.write),
                (Step.OWNERS, feed.guard),
                (Step.RELOAD, self._follow_config),
                (Step.RULESET, self._keep_ruleset),
                (Step.SELF_CHECK, health.run),
                (Step.COUNT, periodic.count),
                (Step.LIMITS, periodic.install_limits),
                (Step.STATUS, self._write_status),
                *((Step.WORKER, worker.watch) for worker in self._workers),
            )
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({stopping, *jobs}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            notify("STOPPING=1")
            await shutdown.cancelled({stopping, *jobs}, _STOP_SECONDS)
        for job in done - {stopping}:
            job.result()  # a job never ends by itself: this raises what ended it

    async def _follow_store(self, ready: Awaitable[None]) -> None:
        await ready
        tried: datetime | None = None
        due: datetime | None = None
        again, run = time.monotonic(), self._steps.run
        while True:
            # What could not be settled is tried again each second, and not all the time.
            pause = _POLL_SECONDS if due in (None, tried) else (due - self._core.clock.now()).total_seconds()
            # Nothing silences the bell while the step waits.
            bell = None if self._steps.seconds_to_retry(Step.STORE) else self._core.bell()
            await readable(bell, min(max(pause, 0.01), until_tick(_POLL_SECONDS)))
            changed = True
            while changed:
                changed, due = await self._sync()
                # Also between two changes: a store that always has another one must not keep grants from ending.
                retry = not changed or time.monotonic() >= again
                if due is not None and due <= self._core.clock.now() and (retry or due != tried):
                    await run(Step.SETTLE, lambda: self._policy_step(self._core.settle), None)
                    tried = due
                if retry:
                    again = time.monotonic() + _POLL_SECONDS
                    if self._core.links_due:
                        await run(Step.LINKS, lambda: self._policy_step(self._core.retry_links), None)

    async def _sync(self) -> tuple[bool, datetime | None]:
        """Takes in what the store has: whether there was anything, and when the next grant ends. That is asked for
        also if the store's step fails: no failure there keeps a grant from ending."""
        both = lambda: (self._core.sync(), self._core.next_expiry())  # noqa: E731 # one step of the thread
        found = await self._steps.run(Step.STORE, lambda: self._policy_step(both), None)
        return found or (False, await self._policy_step(self._core.next_expiry))

    async def _follow_config(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await self._take(load_config(self._path))
                self._reload_failed = False
                _log.info("%s: read again and in force", self._path)
            except PortwardError as error:
                self._reload_failed = True
                self._steps.record_success(Step.RELOAD)
                for line in error.lines():
                    _log.error("the configuration before stays in force: %s", line)
            except Exception as error:
                self._reload_failed = True
                self._steps.record_failure(Step.RELOAD, error)
            else:
                self._steps.record_success(Step.RELOAD)
            notify("READY=1")

    async def _take(self, config: Config) -> None:
        """Puts another configuration in force; raises PortwardError, and then the one before stays."""
        preset = presets.load(config.preset, named_in=self._path)
        for name in settings.FIXED:
            if getattr(config, name) != getattr(self._config, name):
                raise PortwardError(f"{self._path}: {name} cannot change while portward runs: restart it")
        try:
            await self._policy_step(lambda: self._core.reload(config, preset))
        except HeldError as error:
            raise PortwardError(
                f"{self._path}: preset {preset.name} {error}; where that is meant, raise max_flip_share with it"
            ) from None
        self._config = config
        settings.leave(self._path, self._core.config, self._core.preset)

    async def _keep_ruleset(self) -> None:
        """Looks at the ruleset when the kernel says that something of it was changed, and in any case again and
        again."""
        with (
            contextlib.closing(hearing(self._core.own_ports)) as ours,
            contextlib.closing(
                hearing(self._core.own_ports, notice_filter=NoticeFilter.FOREIGN_ELEMENTS)
            ) as others,
        ):
            await RulesetWatch(self._core, self._kernel_step, (ours, others), self._steps).run()

    async def _write_status(self) -> None:
        while True:
            await self._steps.run(Step.STATUS, lambda: self._count_step(self._report), None)
            await asyncio.sleep(until_tick(_STATUS_SECONDS))

    def _report(self) -> None:
        self._report_slow()
        reading, numbers = self._collector.refresh(reload_failed=self._reload_failed)
        document = status(reading, numbers, config=str(self._path), began=self._began)
        with contextlib.suppress(OSError):  # a full disk must not stop enforcement; `status` says how old it is
            self._runtime.write_status(document)

    def _report_slow(self) -> None:
        """Logs that the policy thread has been at one step for long: enforcement goes on, changes wait."""
        work = self._core.work
        if work is None or work.seconds() < _SLOW_SECONDS:
            self._slow = _SLOW_SECONDS
        elif work.seconds() >= self._slow:
            _log.warning(
                "%s has been going on for %.0f s: changes of policy wait, the last known policy stays in force",
                work.what, work.seconds(),
            )  # fmt: skip
            self._slow = 2 * work.seconds()

    def _tell_ready(self, links: Links) -> None:
        segments = self._core.segments()
        _log.info(
            "enforcing %s on %d segments, revision %d, by %s",
            self._core.preset.name, len(segments), self._core.revision,
            "nft queue" if self._core.native else "the xtables NFQUEUE target",
        )  # fmt: skip
        for warning in missing(self._config, links):
            _log.warning("%s", warning)
        notify("READY=1", f"STATUS={len(segments)} segments")


def missing(config: Config, links: Links) -> list[str]:
    """A line for each configured interface that is not there (yet)."""
    names = set(links.names.values())
    return [
        f"{kind}: no interface {pattern!r} is there now"
        for kind, patterns in (("segments", config.segments), ("uplinks", config.uplinks))
        for pattern in patterns
        if not any(matches((pattern,), name) for name in names)
    ]


def run(path: Path) -> None:
    """Runs the daemon with the configuration at `path`; raises PortwardError where it cannot begin."""
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(log_formatter())
    logging.basicConfig(level=logging.INFO, handlers=[out])
    config = load_config(path)
    # What is made beside the table is for the agent's user alone.
    os.umask(0o077)
    # Four threads share one interpreter: a change of policy must not wait 5 ms, Python's default, for a count.
    sys.setswitchinterval(_SWITCH_SECONDS)
    if (limit := descriptors.raise_limit()) < descriptors.ENOUGH:
        _log.warning("%s", descriptors.few(limit))
    # It must live as long as the process: with it would go what it holds, among that the locks.
    daemon = Daemon(path, config)
    try:
        asyncio.run(daemon.run())
    except BaseException as error:
        if daemon.abandoned:
            shutdown.end(error)
        raise
    if daemon.abandoned:
        shutdown.end(None)
