"""The job that brings changes of the store into the policy table, and ends grants on time."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final, Protocol

from portward.daemon.core import Core
from portward.daemon.steps import Step, StepRunner
from portward.daemon.timers import readable, until_tick

# The store's change notifier wakes this job at once. The poll finds a store that changed without it, or came back.
_POLL_S: Final = 1.0
# The shortest pause before a grant that ends now: never zero, so that other jobs run meanwhile.
_SHORTEST_PAUSE_S: Final = 0.01


class OnPolicyThread(Protocol):
    """Runs work on the policy thread, and returns its result."""

    def __call__(self, work: Callable[[], Any], /) -> Awaitable[Any]: ...


class StoreWatch:
    """Calls `Intake.sync` if the store has changed, `decide_due` if a grant has ended, and `retry_links`."""

    def __init__(self, core: Core, on_policy_thread: OnPolicyThread, steps: StepRunner) -> None:
        self._core, self._on_policy_thread, self._steps = core, on_policy_thread, steps
        # When the next grant ends, and the end for which `decide_due` last ran.
        self._due: datetime | None = None
        self._tried: datetime | None = None

    async def run(self, ready: Awaitable[None]) -> None:
        """Waits for `ready`, and then never returns."""
        await ready
        self._due = self._tried = None
        retry_at = time.monotonic()
        while True:
            await self._wait()
            changed = True
            while changed:
                changed = await self._sync()
                # Also between two changes: a store that always has another change must not keep grants from
                # ending.
                retry = not changed or time.monotonic() >= retry_at
                await self._decide_due(retry=retry)
                if retry:
                    retry_at = time.monotonic() + _POLL_S
                    await self._retry_links()

    async def _wait(self) -> None:
        """Returns if the store has changed, at the next poll, or when a grant ends. If `decide_due` failed for
        an end, it is retried at the next poll."""
        if self._due is None or self._due == self._tried:
            pause = _POLL_S
        else:
            pause = (self._due - self._core.clock.now()).total_seconds()
        # While the step waits for its retry, nothing reads the notifier's descriptor, so it would stay readable.
        notifier = None if self._steps.seconds_to_retry(Step.STORE) else self._core.intake.store_descriptor()
        await readable(notifier, min(max(pause, _SHORTEST_PAUSE_S), until_tick(_POLL_S)))

    async def _sync(self) -> bool:
        """Whether the store had a change. Also finds when the next grant ends, even if the store's step fails,
        because no failure there may keep a grant from ending."""
        # One step of the thread for both.
        both = lambda: (self._core.intake.sync(), self._core.next_expiry())  # noqa: E731 # shorter than a function
        found = await self._steps.run(Step.STORE, lambda: self._on_policy_thread(both), None)
        changed, self._due = found or (False, await self._on_policy_thread(self._core.next_expiry))
        return changed

    async def _decide_due(self, *, retry: bool) -> None:
        due = self._due
        if due is not None and due <= self._core.clock.now() and (retry or due != self._tried):
            await self._steps.run(Step.SETTLE, lambda: self._on_policy_thread(self._core.intake.decide_due), None)
            self._tried = due

    async def _retry_links(self) -> None:
        if self._core.intake.links_failed:
            await self._steps.run(Step.LINKS, lambda: self._on_policy_thread(self._core.intake.retry_links), None)
