"""The health check of the workers: each one gets a query through the kernel, again and again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from portward.daemon.core import Core
from portward.daemon.steps import Step, StepRunner
from portward.daemon.systemd import notify, watchdog_seconds
from portward.daemon.timers import until_tick
from portward.daemon.workers import Worker
from portward.dataplane.selfcheck import ANSWER_TIMEOUT_S, PAUSE_S, DifferenceKind
from portward.ipc.probe import Prober

# After a round in which a worker was silent: half a second gives its replacement time to start.
_RETRY_S: Final = 0.5
# This many rounds in a row without an answer under the kernel's policy are logged. One or two can happen while a
# change is on its way.
_MAX_STALE_ROUNDS: Final = 3
# The wait for an answer polls the counters after 5 ms, then after twice as long, up to 100 ms.
_FIRST_POLL_S, _LONGEST_POLL_S = 0.005, 0.1
# The ruleset's counters of answers: under the kernel's policy, and under another one.
_ANSWERS: Final = ("answered", "answered_stale")

CountStep: TypeAlias = Callable[[Callable[[], dict[str, int]]], Awaitable[dict[str, int]]]

_log = logging.getLogger("portward")


class HealthCheck:
    """Finds out whether the workers answer, and under which policy; feeds systemd's watchdog."""

    def __init__(
        self,
        core: Core,
        workers: list[Worker],
        count_step: CountStep,
        stuck: Callable[[], list[str]],
        steps: StepRunner,
    ) -> None:
        """`count_step` runs a step on the counting thread. `stuck` returns a sentence for each thread that makes
        no progress. A round that fails (`steps`) does not feed the watchdog."""
        self._steps, self._core, self._workers, self._count_step = steps, core, workers, count_step
        self._stuck, self._reported = stuck, False
        self._stale_rounds = 0
        # `_ANSWERS` at the end of the last round.
        self._answered = 0, 0
        # Whether the last queries could not be sent.
        self._unsent = False
        # The reading of the counters that has not returned yet.
        self._counted: asyncio.Future[dict[str, int]] | None = None

    async def run(self) -> None:
        """Queries each worker through the kernel, again and again; never returns.

        A worker that does not answer is ended, and `Worker.watch` starts it again. systemd's watchdog is fed only
        if all workers have answered and no thread is stuck. This job runs on the event loop, so the watchdog is
        not fed either while the loop hangs.
        """
        prober = Prober()
        try:
            while True:
                await asyncio.sleep(await self._steps.run(Step.SELF_CHECK, lambda: self._round(prober), _RETRY_S))
        finally:
            prober.close()

    async def _round(self, prober: Prober) -> float:
        """Queries each worker. Returns the seconds until the next round."""
        asked = [worker for worker in self._workers if worker.ready]
        began = time.monotonic()
        silent = await self._silent(prober, asked)
        if silent and self._core.dataplane.loaded_at > began:
            return 0.0  # the query may have been lost with rules that another program removed
        for worker in asked:
            self._rate_worker(worker, silent=worker in silent)
        if not silent and len(asked) == len(self._workers):
            self._take_answers(await self._screen())
        return _RETRY_S if silent else until_tick(self._pause)

    async def _screen(self) -> dict[str, int] | None:
        """The named counters of the ruleset. None if the counting thread does not return them within
        `ANSWER_TIMEOUT_S`. The next round takes them then; whether the thread is stuck is its heartbeat's
        concern."""
        counted = self._counted or asyncio.ensure_future(self._count_step(self._core.counting.screen))
        self._counted = counted
        await asyncio.wait({counted}, timeout=ANSWER_TIMEOUT_S)
        if not counted.done():
            return None
        self._counted = None
        return counted.result()

    async def _silent(self, prober: Prober, asked: list[Worker]) -> list[Worker]:
        """The workers that handle no packet within `ANSWER_TIMEOUT_S`. In a flood the queue may be full and drop
        the query, so a worker that handles other packets counts as answering, too."""
        before = {worker: (worker.process, worker.counters.handled()) for worker in asked}
        for worker in asked:
            try:
                prober.ask(self._workers.index(worker), self._core.dataplane.preset.ports[0])
            except OSError as error:
                if not self._unsent:
                    _log.error("the workers cannot be queried: lo: %s: `ip link set lo up`?", error)
                self._unsent = True
                return []
        self._unsent = False
        deadline, pause = time.monotonic() + ANSWER_TIMEOUT_S, _FIRST_POLL_S
        while True:
            # A worker that has ended meanwhile was not silent, and the one in its place got no query.
            silent = [
                worker
                for worker in asked
                if worker.ready and before[worker] == (worker.process, worker.counters.handled())
            ]
            if not silent or time.monotonic() > deadline:
                return silent
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_S)

    def _rate_worker(self, worker: Worker, *, silent: bool) -> None:
        """Ends a worker that does not answer. If its replacement does not answer either, the worker is rarely the
        cause: something keeps packets from its queue. So workers are ended after 1, 2, 4, 8 … silent rounds."""
        # If no query was sent, it is unknown whether it answers.
        worker.answers = not silent and not self._unsent
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
        self._core.selfcheck.differs(DifferenceKind.WORKER, what)

    def _take_answers(self, screen: dict[str, int] | None) -> None:
        """Feeds the watchdog, because no worker was silent.

        Answers under another policy than the kernel's are normal while a change is on its way, so only the third
        such round in a row counts. If there was no answer of either kind, the query waits behind a flood or was
        dropped by a full queue. Then `portward_self_check_age_seconds` rises.
        """
        screen = screen or {}
        answered, stale = (screen.get(name, last) for name, last in zip(_ANSWERS, self._answered, strict=True))
        if answered != self._answered[0]:
            self._stale_rounds = 0
            self._core.selfcheck.well()
        elif stale != self._answered[1]:
            self._stale_rounds += 1
        self._answered = answered, stale
        if self._stale_rounds < _MAX_STALE_ROUNDS and self._all_make_progress() and watchdog_seconds() is not None:
            notify("WATCHDOG=1")
        if self._stale_rounds == _MAX_STALE_ROUNDS:
            self._core.selfcheck.differs(
                DifferenceKind.ANSWER,
                "workers answer, but not under the policy in the kernel: is the policy table another file? "
                "restart portward",
            )

    def _all_make_progress(self) -> bool:
        """Whether every thread makes progress. Logs once which threads do not, and once that all do again."""
        stuck = self._stuck()
        if stuck and not self._reported:
            _log.critical("%s: the service manager's watchdog is not fed until this ends", "; ".join(stuck))
        elif self._reported and not stuck:
            _log.warning("all threads make progress again")
        self._reported = bool(stuck)
        return not stuck

    @property
    def _pause(self) -> float:
        every = watchdog_seconds()
        return PAUSE_S if every is None else min(PAUSE_S, every / 4)
