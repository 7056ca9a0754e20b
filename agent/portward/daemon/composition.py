"""The daemon: it builds everything, starts it in order, runs the jobs, and ends them in order.

    policy thread    store, interfaces, time ─► policy table ─┐
    kernel thread    epoch, then verdict cache ◄──────────────┘   ruleset changed by another program ─► repair
    counting thread  reads what the kernel has counted

The threads run the steps of `Core`. The asyncio loop beside them only waits: for sockets, processes, signals and
time. A stop (SIGTERM) leaves ruleset and cached verdicts in the kernel, so nothing opens. The locks of the table
folder and of the network namespace are held as long as a thread may write. If a thread does not end in time, they
are held until the process is gone.
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
from pathlib import Path
from typing import Any, Final

from portward.base import clock, descriptors
from portward.base.interfaces import matches
from portward.config.keys import Config
from portward.config.load import load_config
from portward.daemon import namespace_watch, settings, shutdown, workers
from portward.daemon.config_reload import ConfigReload
from portward.daemon.core import Core
from portward.daemon.health import HealthCheck
from portward.daemon.linkfeed import LinkFeed, followed
from portward.daemon.metrics import FAMILIES, MetricsCollector
from portward.daemon.periodic import LimitRequests, PeriodicJobs
from portward.daemon.ruleset_watch import RulesetWatch
from portward.daemon.runtime import Runtime
from portward.daemon.status_writer import StatusWriter
from portward.daemon.steps import Step, StepRunner
from portward.daemon.store_watch import StoreWatch
from portward.daemon.systemd import log_formatter, notify
from portward.daemon.threads import Threads
from portward.daemon.workers import Worker
from portward.dataplane.links import Links
from portward.dataplane.monitor import NoticeFilter
from portward.dataplane.namespacelock import NamespaceLock
from portward.dataplane.reconciler import hearing
from portward.metrics.family import Snapshot
from portward.metrics.server import MetricsServer
from portward.policy import presets
from portward.policy.preset import Preset
from portward.table.database import put_aside

# Four threads share one interpreter. With Python's default of 5 ms a change of policy could wait that long for a
# count.
_SWITCH_S: Final = 0.0005
# READY waits at most this long for changes that the store got while no agent ran. A locked store or a bulk change
# must not keep a gateway from starting; until then it enforces the last known policy.
_FIRST_READING_S: Final = 1.0
# A stop waits this long for the jobs, and then for the threads. Work that takes longer (a bulk change, a busy
# kernel) is abandoned with the process: SQLite, LMDB and nftables keep the state before it. systemd kills after
# 10 s (`TimeoutStopSec`).
_STOP_S: Final = 1.0

_log = logging.getLogger("portward")


class Daemon:
    """One running gateway."""

    def __init__(self, path: Path, config: Config, instance: str | None = None) -> None:
        """`config` was read from `path`, which is read again on SIGHUP. `instance` is the name of the network
        namespace that this process is in; None if it does not matter."""
        self._path, self._config, self._instance = path, config, instance
        self._threads = Threads()
        self._policy_step, self._kernel_step = self._threads.policy, self._threads.kernel
        self._count_step = self._threads.counting
        self._stopping = asyncio.Event()
        self._reload = asyncio.Event()
        # Fails once the namespace of an instance has lost its name. Until then it never ends.
        self._namespace_lost: asyncio.Future[None]
        # Whether a thread may still be at work. Then the process must end without waiting for it.
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
        """Runs until SIGTERM or SIGINT. Raises PortwardError if the gateway cannot start; then nothing is loaded.
        If `abandoned` is set afterwards, the locks are still held."""
        # First of all, because a signal during the start must not end it half-way.
        self._catch_signals()
        # From here on, because the namespace may be made anew during the start, too, which takes minutes if the
        # store is large.
        self._namespace_lost = asyncio.ensure_future(namespace_watch.watch(self._instance))
        async with contextlib.AsyncExitStack() as stack:
            # The steps that end the gateway, the last one first. They are registered before anything starts, so
            # that an error or a signal at any step of the start ends it in this order.
            stack.callback(self._threads.close)
            stack.callback(self._release)
            stack.push_async_callback(lambda: workers.stop(self._workers))
            stack.push_async_callback(self._close)
            stack.push_async_callback(lambda: shutdown.cancel({self._namespace_lost}, _STOP_S))
            # Until `_close` has seen all threads end. An error on the way there leaves it set.
            self.abandoned = True
            starting = asyncio.ensure_future(self._start(stack))
            if await self._stopped_before(starting):
                return
            await self._serve(*starting.result())
        _log.info("stopped; the ruleset stays in force, and cached verdicts until they end")

    async def _start(
        self, stack: contextlib.AsyncExitStack
    ) -> tuple[AsyncIterator[Links], Links, asyncio.Future[None]]:
        """Loads the ruleset. From then on it must be kept as it is, and interfaces must be followed. Returns the
        changes of interfaces, the interfaces that the table has, and the first reading of the store, which may
        still be going on."""
        links = await self._open(stack)
        await self._policy_step(self._core.intake.first_policy)
        first = await anext(links)
        await self._policy_step(lambda: self._core.first_links(first))
        # Meanwhile the workers load their libraries.
        reading = asyncio.ensure_future(
            self._steps.run(Step.STORE, lambda: self._policy_step(self._first_sync), None)
        )
        await asyncio.gather(self._kernel_step(self._core.prepare), *(worker.start() for worker in self._workers))
        await self._kernel_step(self._core.load)
        settings.leave(self._path, self._core.dataplane.config, self._core.dataplane.preset)
        # The gateway enforces first, because enforcement needs no address to listen at.
        stack.callback(self._metrics.close)
        self._metrics.start()
        return links, first, reading

    async def _open(self, stack: contextlib.AsyncExitStack) -> AsyncIterator[Links]:
        """Takes everything that another process could have: the locks of the table folder and of the network
        namespace, and the kernel's queues. Returns the changes of interfaces."""
        runtime = Runtime(self._config.table)
        self._locks.callback(runtime.close)
        self._runtime = runtime
        settings.forget(self._config.table)
        if runtime.crashed:
            _log.error("portward crashed the last time: %s", runtime.crashed)
        # Before anything is written. Otherwise two agents would each remove the other's rules, for ever.
        await self._kernel_step(lambda: self._locks.callback(NamespaceLock().close))
        if runtime.table_cut_off:
            put_aside(self._config.table, f"{self._config.table}: the policy table was cut off")
        preset = presets.load(self._config.preset, named_in=self._path)
        self._workers = workers.make(self._config.queue, self._config.table, self._limit_requests.add)
        for worker in self._workers:
            await worker.prepare()
        opening = asyncio.ensure_future(self._kernel_step(lambda: self._open_core(preset)))
        # The library behind the metrics takes longer to load than the rest of the daemon. So it is loaded while
        # the workers load their libraries and the core asks the kernel.
        from portward.dataplane import rtnetlink  # noqa: PLC0415 # see above
        from portward.metrics.exporter import scrape_handler  # noqa: PLC0415 # see above

        await opening
        # The counting thread starts now, because later the process may have no threads left.
        await self._count_step(lambda: None)
        answer = scrape_handler(FAMILIES, self._newest)
        self._metrics = MetricsServer(self._config.metrics_endpoints(), answer)
        self._collector = MetricsCollector(
            self._core, self._workers, self._metrics, self._steps, self._threads.heartbeat
        )
        self._follow_links = rtnetlink.follow
        return await stack.enter_async_context(contextlib.aclosing(rtnetlink.follow()))

    def _open_core(self, preset: Preset) -> None:
        """Runs on the kernel thread, where `_close_core` finds the core even if nothing waits for this step."""
        self._core = Core(self._config, preset, self._threads.on_kernel)
        self._opened = True

    def _close_core(self) -> None:
        if self._opened:
            self._core.close()

    async def _close(self) -> None:
        """Ends the threads, and closes what they use when none of them is at work any more."""
        nothing: Callable[[], None] = lambda: None  # noqa: E731 # typed
        if self._opened:
            self._core.intake.stop()
        try:
            async with asyncio.timeout(_STOP_S):
                policy, counting = nothing, nothing
                if self._opened:
                    policy, counting = self._core.intake.close, self._core.counting.end
                await self._threads.end(policy, counting, self._close_core)
        except TimeoutError:
            work = self._core.work if self._opened else None
            _log.info("stopped in the midst of %s", "a step" if work is None else work.what)
        else:
            self.abandoned = False

    def _release(self) -> None:
        """Releases both locks, unless a thread may still write. Then the kernel releases them with the process."""
        if not self.abandoned:
            self._locks.close()

    async def _stopped_before(self, work: Awaitable[object]) -> bool:
        """Waits for `work` or for a signal to stop; True if the signal came first. Raises what `work` raises, and
        PortwardError if the namespace loses its name before `work` is done."""
        working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        ends: set[asyncio.Future[Any]] = {working, stopping, self._namespace_lost}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            working.result()
            return False
        # A step that a thread has begun goes on. Errors of `work` are ignored now.
        await shutdown.cancel({working}, _STOP_S)
        if self._namespace_lost.done():
            self._namespace_lost.result()
        return True

    def _first_sync(self) -> None:
        """Takes changes from the store that it got while no agent ran. Policy thread."""
        until = time.monotonic() + _FIRST_READING_S
        while self._core.intake.sync() and time.monotonic() < until:
            pass

    async def _become_ready(self, reading: asyncio.Future[None], first: Links) -> None:
        """Sends READY when the changes of `reading` are enforced, or after `_FIRST_READING_S`. Returns when
        `reading` has ended."""
        await asyncio.wait({reading}, timeout=_FIRST_READING_S)
        if reading.done():
            # This step runs behind the changes that `reading` has handed over to the kernel thread.
            await self._kernel_step(lambda: None)
        else:
            _log.warning(
                "the store has not been read within %g s: the policy of the last run is in force until it is",
                _FIRST_READING_S,
            )
        self._announce_ready(first)
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
        store_watch = StoreWatch(self._core, self._policy_step, self._steps)
        reload = ConfigReload(self._path, self._config, self._core, self._threads, self._steps)
        status_writer = StatusWriter(
            self._path, self._core, self._collector, self._runtime, lambda: reload.failed, self._began
        )
        ready = asyncio.ensure_future(self._become_ready(reading, first))
        changes = followed(links, self._follow_links, self._steps)
        # An error in a job outside of its steps counts as a failure of this step.
        jobs = [
            asyncio.create_task(self._steps.keep_running(step, job))
            for step, job in (
                (Step.SETTLE, lambda: store_watch.run(ready)),
                (Step.OWNERS, lambda: feed.follow(changes)),
                (Step.DEVICES, feed.see),
                (Step.LINKS, feed.write),
                (Step.OWNERS, feed.close_uncertain),
                (Step.RELOAD, lambda: reload.run(self._reload)),
                (Step.RULESET, self._keep_ruleset),
                (Step.SELF_CHECK, health.run),
                (Step.COUNT, periodic.count),
                (Step.LIMITS, periodic.install_limits),
                (Step.STATUS, lambda: status_writer.run(self._threads, self._steps)),
                *((Step.WORKER, worker.watch) for worker in self._workers),
            )
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        ends: set[asyncio.Future[Any]] = {stopping, self._namespace_lost, *jobs}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            notify("STOPPING=1")
            await shutdown.cancel(ends, _STOP_S)
        for job in done - {stopping}:
            job.result()  # a job never returns, so this raises the error that ended it

    async def _keep_ruleset(self) -> None:
        """Checks the ruleset when the kernel reports a change, and periodically."""
        with (
            contextlib.closing(hearing(self._core.own_ports)) as ours,
            contextlib.closing(
                hearing(self._core.own_ports, notice_filter=NoticeFilter.FOREIGN_ELEMENTS)
            ) as others,
        ):
            await RulesetWatch(self._core, self._kernel_step, (ours, others), self._steps).run()

    def _announce_ready(self, links: Links) -> None:
        segments = set(self._core.intake.segments().values())
        _log.info(
            "enforcing %s on %d segments, revision %d, by %s",
            self._core.dataplane.preset.name, len(segments), self._core.revision,
            "nft queue" if self._core.native else "the xtables NFQUEUE target",
        )  # fmt: skip
        for warning in missing(self._config, links):
            _log.warning("%s", warning)
        notify("READY=1", f"STATUS={len(segments)} segments")


def missing(config: Config, links: Links) -> list[str]:
    """A line for each pattern and each group of the configuration that no interface has now."""
    names = set(links.names.values())
    groups = [
        f"groups: no interface of group {group.name!r} ({', '.join(group.interfaces)}) is there now"
        for group in config.groups
        if not any(matches(group.interfaces, name) for name in names)
    ]
    return groups + [
        f"{kind}: no interface {pattern!r} is there now"
        for kind, patterns in (("segments", config.segments), ("uplinks", config.uplinks))
        for pattern in patterns
        if not any(matches((pattern,), name) for name in names)
    ]


def run(path: Path, instance: str | None = None) -> None:
    """Runs the daemon with the configuration at `path`, in the network namespace of this process. If `instance` is
    its name, the daemon ends when the namespace loses that name. Raises PortwardError for that, and if the daemon
    cannot start."""
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(log_formatter())
    logging.basicConfig(level=logging.INFO, handlers=[out])
    config = load_config(path)
    # Files beside the table are for the agent's user alone.
    os.umask(0o077)
    sys.setswitchinterval(_SWITCH_S)
    if (limit := descriptors.raise_limit()) < descriptors.ENOUGH:
        _log.warning("%s", descriptors.few_text(limit))
    # It must live as long as the process, because it holds the locks.
    daemon = Daemon(path, config, instance)
    try:
        asyncio.run(daemon.run())
    except BaseException as error:
        if daemon.abandoned:
            shutdown.exit_now(error)
        raise
    if daemon.abandoned:
        shutdown.exit_now(None)
