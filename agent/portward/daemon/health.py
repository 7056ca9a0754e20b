"""The self-check of the workers: each is asked a question through the kernel, again and again."""

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
from portward.dataplane.selfcheck import PATIENCE, PAUSE, DifferenceKind
from portward.ipc.probe import Prober

# After a silence: is the worker that took the place of the silent one any better?
_ASK_AGAIN: Final = 0.5
# Rounds in a row without an answer under the kernel's policy until that is logged.
_STRANGE: Final = 3
# The counters of answers: under the kernel's policy, and under another one.
_ANSWERS: Final = ("answered", "answered_stale")

CountStep: TypeAlias = Callable[[Callable[[], dict[str, int]]], Awaitable[dict[str, int]]]

_log = logging.getLogger("portward")


class HealthCheck:
    """Whether the workers answer, and under which policy."""

    def __init__(
        self,
        core: Core,
        workers: list[Worker],
        count_step: CountStep,
        stuck: Callable[[], list[str]],
        steps: StepRunner,
    ) -> None:
        """`count_step` runs a step on the thread that only reads and counts. `stuck` gives a sentence for each
        thread that does not get further. A round that fails (`steps`) feeds no watchdog."""
        self._steps, self._core, self._workers, self._count_step = steps, core, workers, count_step
        self._stuck, self._reported = stuck, False
        self._strange = 0
        # Answers that the kernel had counted when the last round ended, under its policy and under another one.
        self._answered = 0, 0
        self._unasked = False
        # The counting thread's answer that is still awaited.
        self._counted: asyncio.Future[dict[str, int]] | None = None

    async def run(self) -> None:
        """Asks each worker a question through the kernel, again and again; one that does not answer is ended, and
        `watch` starts it anew. The service manager's watchdog is fed only if all have answered and no thread is
        stuck; this job runs on the event loop, so it is not fed either while that hangs."""
        prober = Prober()
        try:
            while True:
                await asyncio.sleep(
                    await self._steps.run(Step.SELF_CHECK, lambda: self._round(prober), _ASK_AGAIN)
                )
        finally:
            prober.close()

    async def _round(self, prober: Prober) -> float:
        """Asks each worker; gives the seconds until the next round."""
        asked = [worker for worker in self._workers if worker.ready]
        began = time.monotonic()
        silent = await self._silent(prober, asked)
        if silent and self._core.reconciler.loaded_at > began:
            return 0.0  # the query may have gone with the rules that somebody took away
        for worker in asked:
            self._judge_worker(worker, silent=worker in silent)
        if not silent and len(asked) == len(self._workers):
            self._take_answers(await self._screen())
        return _ASK_AGAIN if silent else until_tick(self._pause)

    async def _screen(self) -> dict[str, int] | None:
        """The named counters; None if the counting thread has not given them within the time of patience. Nothing
        else waits for it: whether it is stuck is for its heartbeat to say."""
        counted = self._counted or asyncio.ensure_future(self._count_step(self._core.screen))
        self._counted = counted
        await asyncio.wait({counted}, timeout=PATIENCE)
        if not counted.done():
            return None
        self._counted = None
        return counted.result()

    async def _silent(self, prober: Prober, asked: list[Worker]) -> list[Worker]:
        """Those of the workers that handle nothing within the time of patience. Under a flood the query may find
        the queue full; whoever handles other packets meanwhile answers too."""
        before = {worker: (worker.process, worker.counters.handled()) for worker in asked}
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
                if worker.ready and before[worker] == (worker.process, worker.counters.handled())
            ]
            if not silent or time.monotonic() > deadline:
                return silent
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _judge_worker(self, worker: Worker, *, silent: bool) -> None:
        """Ends a worker that does not answer. Where a new one does not either, it is seldom to blame: something
        keeps packets from its queue, so each further try waits twice as long."""
        # Without a question there was no answer either.
        worker.answers = not silent and not self._unasked
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
        """Feeds the watchdog where no worker was silent. Answers under another policy than the kernel's are met
        while a change is on its way, so only the third round in a row counts. Where neither kind came, the query
        waits behind a flood, or was dropped by a full queue: `portward_self_check_age_seconds` rises."""
        screen = screen or {}
        answered, stale = (screen.get(name, last) for name, last in zip(_ANSWERS, self._answered, strict=True))
        if answered != self._answered[0]:
            self._strange = 0
            self._core.selfcheck.well()
        elif stale != self._answered[1]:
            self._strange += 1
        self._answered = answered, stale
        if self._strange < _STRANGE and self._all_get_on() and watchdog_seconds() is not None:
            notify("WATCHDOG=1")
        if self._strange == _STRANGE:
            self._core.selfcheck.differs(
                DifferenceKind.ANSWER,
                "workers answer, but not under the policy in the kernel: is the policy table another file? "
                "restart portward",
            )

    def _all_get_on(self) -> bool:
        """Whether every thread makes progress; logs once which do not, and once that all do again."""
        stuck = self._stuck()
        if stuck and not self._reported:
            _log.critical("%s: the service manager's watchdog is not fed until this ends", "; ".join(stuck))
        elif self._reported and not stuck:
            _log.warning("all threads get on again")
        self._reported = bool(stuck)
        return not stuck

    @property
    def _pause(self) -> float:
        every = watchdog_seconds()
        return PAUSE if every is None else min(PAUSE, every / 4)
