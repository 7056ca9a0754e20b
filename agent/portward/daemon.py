"""The daemon, and the only composition root: workers, core, links, metrics and signals, wired together.

    store ─► Follower ─► Writer (decide) ─► Enforcement (epoch, then forget)
    links ─────────────► Writer ──────────► Enforcement
    rules were changed, or time goes by: is the ruleset still the one that was loaded?

These are the steps of `Core`, and they run on one thread of their own; the asyncio loop beside it only waits:
for sockets, processes, signals and time. Stopping (SIGTERM) leaves ruleset and remembered verdicts in the
kernel: nothing opens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from portward import config as configuration
from portward import report
from portward.config import Config
from portward.core import Core
from portward.errors import PortwardError
from portward.gateway import workers
from portward.gateway.learned import Source
from portward.gateway.links import Links
from portward.gateway.notices import Notices
from portward.gateway.probe import Prober
from portward.gateway.workers import Worker
from portward.notify import log_formatter, notify, watchdog_seconds
from portward.policy import preset as presets
from portward.runtime import Runtime
from portward.selfcheck import PATIENCE, PAUSE, Kind
from portward.snapshot import Snapshot
from portward.store.flips import HeldError
from portward.table.database import put_aside

# What is done again and again is done at the same moments: a process that wakes finds its caches cold, and what it
# does then costs several times as much as when it is awake already.
_CHECK_SECONDS: Final = 0.5
_STATUS_SECONDS: Final = 1.0
_CHECK_PAUSE: Final = 0.01
# After a silence: is the worker that took the place of the silent one any better?
_ASK_AGAIN: Final = 0.5
_COUNT_SECONDS: Final = 5.0
# To read half a million counters takes seconds: they are read less often then, for a quarter of a core at most.
_COUNT_REST: Final = 3.0
# So many sources with a limit are taken in at once, and then there is a pause, in seconds: each costs some 10 µs.
_UNRATED: Final = 256
_RATE_PAUSE: Final = 0.05
# The store's bell wakes at once; the poll is for a store that changed without it, or came back.
_POLL_SECONDS: Final = 1.0
_SWITCH_SECONDS: Final = 0.0005
# Rounds in a row without an answer under the kernel's policy until that is told.
_STRANGE: Final = 3
# Changes of these take another process: sockets and files are opened at the start.
_FIXED: Final = ("store", "table", "queue", "metrics")

_log = logging.getLogger("portward")
_T = TypeVar("_T")


class Daemon:
    """One running gateway."""

    def __init__(self, path: Path, config: Config) -> None:
        """`path` is where `config` was read, and is read again on SIGHUP."""
        self._path, self._config = path, config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="core")
        self._counting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="counting")
        self._stopping = asyncio.Event()
        self._reload = asyncio.Event()
        self._snapshot = Snapshot()
        self._reload_failed = False
        self._strange = 0
        # Answers that the kernel had counted when the last round ended, under its policy and under another one.
        self._answered = 0, 0
        self._unasked = False
        self._started = datetime.now(UTC)
        self._core: Core
        self._workers: list[Worker] = []
        # Sources whose limit the kernel does not know, as workers have met them.
        self._unrated: dict[Source, None] = {}
        self._asked = asyncio.Event()

    async def run(self) -> None:
        """Runs until SIGTERM or SIGINT. Raises PortwardError where the gateway cannot begin; then nothing has
        been loaded."""
        # First of all: a signal that comes while the gateway starts must not end it half-way.
        self._catch_signals()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._thread.shutdown)
            stack.callback(self._counting.shutdown)
            links = await self._open(stack)
            await self._step(self._core.first_policy)
            first = await anext(links)
            await self._step(lambda: self._core.first_links(first))
            await asyncio.gather(*(worker.start() for worker in self._workers))
            await self._step(self._core.load)
            self._tell_ready(first)
            await self._serve(links)
        _log.info("stopped; ruleset and remembered verdicts stay in force")

    async def _open(self, stack: contextlib.AsyncExitStack) -> AsyncIterator[Links]:
        """Takes all that can be taken by somebody else: lock, kernel, address; gives the interfaces to follow."""
        runtime = Runtime(self._config.table)
        stack.callback(runtime.close)
        self._runtime = runtime
        if runtime.crashed:
            _log.error("portward crashed the last time: %s", runtime.crashed)
        if runtime.table_cut_off:
            put_aside(self._config.table, f"{self._config.table}: the policy table was cut off")
        preset = presets.load(self._config.preset, named_in=self._path)
        self._workers = workers.make(self._config.queue, self._config.table, self._ask_rate)
        for worker in self._workers:
            stack.push_async_callback(worker.stop)
            await worker.prepare()
        opening = asyncio.ensure_future(self._step(lambda: Core(self._config, preset)))
        # The library behind the metrics takes longer to load than all else of the daemon. Meanwhile the workers'
        # processes load theirs, and the core asks the kernel.
        from portward import metrics  # noqa: PLC0415 # as said above
        from portward.gateway import rtnetlink  # noqa: PLC0415 # as said above

        self._core = await opening
        stack.push_async_callback(self._close)
        if (address := self._config.metrics_address()) is not None:
            server = metrics.Server(*address, self._newest)
            stack.callback(server.close)
        return await stack.enter_async_context(contextlib.aclosing(rtnetlink.follow()))

    async def _close(self) -> None:
        # What still counts must end before what it reads is closed.
        await self._count_step(lambda: None)
        await self._step(self._core.close)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)

    def _newest(self) -> Snapshot:
        """The snapshot of the last second, with the revision that is enforced now."""
        return replace(self._snapshot, enforced_revision=self._core.enforced)

    async def _serve(self, links: AsyncIterator[Links]) -> None:
        jobs = [
            asyncio.create_task(job)
            for job in (
                self._follow_store(),
                self._follow_links(links),
                self._follow_config(),
                self._keep_ruleset(),
                self._ask_workers(),
                self._count(),
                self._rate(),
                self._write_status(),
                *(worker.watch() for worker in self._workers),
            )
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        done, _ = await asyncio.wait({stopping, *jobs}, return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        for job in (stopping, *jobs):
            job.cancel()
        await asyncio.gather(stopping, *jobs, return_exceptions=True)
        for job in done - {stopping}:
            job.result()  # a job never ends by itself: this raises what ended it

    async def _step(self, work: Callable[[], _T]) -> _T:
        """Runs a step on the thread that alone writes table and kernel."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _count_step(self, work: Callable[[], _T]) -> _T:
        """Runs a step on the thread that only reads and counts."""
        return await asyncio.get_running_loop().run_in_executor(self._counting, work)

    async def _follow_store(self) -> None:
        tried: datetime | None = None
        due: datetime | None = None
        while True:
            # What could not be settled is tried again each second, and not all the time.
            pause = _POLL_SECONDS if due in (None, tried) else (due - self._core.clock.now()).total_seconds()
            await _readable(self._core.bell(), min(max(pause, 0.01), _until_tick(_POLL_SECONDS)))
            changed = True
            while changed:
                changed, due = await self._step(lambda: (self._core.sync(), self._core.next_expiry()))
            if due is not None and due <= self._core.clock.now():
                await self._step(self._core.settle)
                tried = due

    async def _follow_links(self, links: AsyncIterator[Links]) -> None:
        async for change in links:
            await self._step(lambda change=change: self._core.links_changed(change))  # type: ignore[misc]

    async def _follow_config(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await self._take(configuration.load(self._path))
                self._reload_failed = False
                _log.info("%s: read again and in force", self._path)
            except PortwardError as error:
                self._reload_failed = True
                _log.error("the configuration before stays in force: %s", error)
            notify("READY=1")

    async def _take(self, config: Config) -> None:
        """Puts another configuration in force; raises PortwardError, and then the one before stays."""
        preset = presets.load(config.preset, named_in=self._path)
        for name in _FIXED:
            if getattr(config, name) != getattr(self._config, name):
                raise PortwardError(f"{self._path}: {name} cannot change while portward runs: restart it")
        try:
            await self._step(lambda: self._core.reload(config, preset))
        except HeldError as error:
            raise PortwardError(
                f"{self._path}: preset {preset.name} {error}; where that is meant, raise max_flip_share with it"
            ) from None
        self._config = config

    async def _keep_ruleset(self) -> None:
        """Looks at the ruleset when the kernel says that one was changed, and in any case again and again: notices
        can be lost."""
        with contextlib.closing(Notices()) as notices:
            while True:
                await _readable(notices.fileno(), _until_tick(_CHECK_SECONDS))
                notices.drain()
                if not self._core.at_rest():
                    await self._step(self._core.check)
                    # Somebody who writes rules all the time must not keep the core from everything else.
                    await asyncio.sleep(_CHECK_PAUSE)

    async def _ask_workers(self) -> None:
        """Asks each worker a question through the kernel, again and again; one that does not answer is ended, and
        `watch` starts it anew. Only where all have answered is the service manager's watchdog fed."""
        prober = Prober()
        try:
            while True:
                asked = [worker for worker in self._workers if worker.ready]
                began = time.monotonic()
                silent = await self._silent(prober, asked)
                if silent and self._core.keeper.loaded_at > began:
                    continue  # the query may have gone with the rules that somebody took away
                for worker in asked:
                    self._judge_worker(worker, silent=worker in silent)
                if not silent and len(asked) == len(self._workers):
                    self._take_answers(await self._count_step(self._core.screen))
                await asyncio.sleep(_ASK_AGAIN if silent else _until_tick(self._pause))
        finally:
            prober.close()

    async def _silent(self, prober: Prober, asked: list[Worker]) -> list[Worker]:
        """Those of the workers that handle nothing within the time of patience. Under a flood the query may find
        the queue full; whoever handles other packets meanwhile answers too."""
        before = {worker: (worker.process, worker.tally.handled()) for worker in asked}
        for worker in asked:
            try:
                prober.ask(self._workers.index(worker), self._core.preset.ports[0])
            except OSError as error:
                if not self._unasked:
                    _log.error(
                        "the workers cannot be asked whether they answer: lo: %s: `ip link set lo up`?", error
                    )
                self._unasked = True
                return []
        self._unasked = False
        deadline, pause = time.monotonic() + PATIENCE, 0.005
        while True:
            # One that has ended meanwhile was not silent, and the one in its place was not asked.
            silent = [
                worker
                for worker in asked
                if worker.ready and before[worker] == (worker.process, worker.tally.handled())
            ]
            if not silent or time.monotonic() > deadline:
                return silent
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _judge_worker(self, worker: Worker, *, silent: bool) -> None:
        """Ends a worker that does not answer. Where a new one does not either, it is seldom to blame: something
        keeps packets from its queue, so each further try waits twice as long."""
        if not silent:
            worker.silences = 0
            return
        worker.silences += 1
        if worker.silences.bit_count() == 1:
            what = f"the worker of queue {worker.queue} does not answer: it is ended"
            worker.kill()
        else:
            what = (
                f"no query has reached the worker of queue {worker.queue}: is a rule of others before the queue?"
            )
        self._core.selfcheck.differs(Kind.WORKER, what)

    def _take_answers(self, screen: dict[str, int]) -> None:
        """Feeds the watchdog where no worker was silent. Answers under another policy than the kernel's are met
        while a change is on its way, so only the third round in a row counts. Where neither kind came, the query
        waits behind a flood, or was dropped by a full queue: `portward_self_check_age_seconds` rises."""
        answered, stale = screen.get("answered", 0), screen.get("answered_stale", 0)
        if answered != self._answered[0]:
            self._strange = 0
            self._core.selfcheck.well()
        elif stale != self._answered[1]:
            self._strange += 1
        self._answered = answered, stale
        if self._strange < _STRANGE and watchdog_seconds() is not None:
            notify("WATCHDOG=1")
        if self._strange == _STRANGE:
            self._core.selfcheck.differs(
                Kind.ANSWER,
                "workers answer, but not under the policy in the kernel: is the policy table another file? "
                "restart portward",
            )

    @property
    def _pause(self) -> float:
        every = watchdog_seconds()
        return PAUSE if every is None else min(PAUSE, every / 4)

    async def _count(self) -> None:
        while True:
            began = time.monotonic()
            await self._count_step(self._core.count)
            if suspects := await self._count_step(self._core.suspects):
                await self._step(lambda suspects=suspects: self._core.correct(suspects))  # type: ignore[misc]
            await self._step(self._core.keep_rates)
            took = time.monotonic() - began
            await asyncio.sleep(max(_until_tick(_COUNT_SECONDS), _COUNT_REST * took))

    def _ask_rate(self, source: Source) -> None:
        if len(self._unrated) < _UNRATED:
            self._unrated[source] = None
            self._asked.set()

    async def _rate(self) -> None:
        """Brings the limits of sources that workers have met into the kernel, some hundred of them at a time: who
        has a large prefix can make up as many as he likes."""
        while True:
            await self._asked.wait()
            batch = list(self._unrated)
            self._unrated.clear()
            self._asked.clear()
            await self._step(lambda batch=batch: self._core.asked(batch))  # type: ignore[misc]
            await asyncio.sleep(_RATE_PAUSE)

    async def _write_status(self) -> None:
        while True:
            await self._count_step(self._report)
            await asyncio.sleep(_until_tick(_STATUS_SECONDS))

    def _report(self) -> None:
        self._snapshot = report.snapshot(self._core, self._workers, reload_failed=self._reload_failed)
        told = report.status(
            self._core, self._workers, self._snapshot, config=str(self._path), started=self._started
        )
        with contextlib.suppress(OSError):  # a full disk must not stop enforcement; `status` says how old it is
            self._runtime.write_status(told)

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


def _until_tick(seconds: float) -> float:
    """Seconds until the next of the moments that lie so many seconds apart, the same ones for all."""
    return seconds - asyncio.get_running_loop().time() % seconds


async def _readable(descriptor: int | None, seconds: float) -> None:
    """Waits until a descriptor can be read, or for so many seconds.

    It is let go of as soon as it can: until it is drained the loop would turn around it all the time, and keep the
    thread that works waiting.
    """
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if descriptor is not None:
            loop.remove_reader(descriptor)
        if not woken.done():
            woken.set_result(None)

    if descriptor is not None:
        loop.add_reader(descriptor, wake)
    timer = loop.call_later(seconds, wake)
    try:
        await woken
    finally:
        timer.cancel()
        if descriptor is not None:
            loop.remove_reader(descriptor)


def missing(config: Config, links: Links) -> list[str]:
    """A line for each configured interface that is not there (yet)."""
    names = set(links.names.values())
    return [
        f"{kind}: no interface {pattern!r} is there now"
        for kind, patterns in (("segments", config.segments), ("uplinks", config.uplinks))
        for pattern in patterns
        if not any(configuration.matches((pattern,), name) for name in names)
    ]


def run(path: Path) -> None:
    """Runs the daemon with the configuration at `path`; raises PortwardError where it cannot begin."""
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(log_formatter())
    logging.basicConfig(level=logging.INFO, handlers=[out])
    config = configuration.load(path)
    # Three threads share one interpreter: a change of policy must not wait 5 ms, Python's default, for a count.
    sys.setswitchinterval(_SWITCH_SECONDS)
    asyncio.run(_run(path, config))
    if workers.stay_seconds():
        # What asyncio has started it also ends when it is collected: the workers are to stay.
        logging.shutdown()
        os._exit(0)


async def _run(path: Path, config: Config) -> None:
    await Daemon(path, config).run()
