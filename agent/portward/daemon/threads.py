"""The three threads of the daemon: policy, kernel and counting.

Each thread runs one step at a time, in the order of the calls. The event loop waits for the steps. If such a wait
is cancelled, a step that has begun goes on. So a lock that the steps need may be released only after `end` has
returned. The last steps of `end` close what the threads use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from portward.base.heartbeat import Heartbeat, Lane

_T = TypeVar("_T")


class Threads:
    """The three threads. Each starts with its first step."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()
        self._policy, self._kernel, self._counting = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) for name in ("policy", "kernel", "counting")
        )

    async def policy(self, work: Callable[[], _T]) -> _T:
        """Runs a step on the only thread that writes the policy table."""
        return await _run(self._policy, self.heartbeat.policy, work)

    async def kernel(self, work: Callable[[], _T]) -> _T:
        """Runs a step on the only thread that writes the kernel."""
        return await _run(self._kernel, self.heartbeat.kernel, work)

    def on_kernel(self, work: Callable[[], _T]) -> Future[_T]:
        """Like `kernel`, for callers on other threads: returns a future at once."""
        return self._kernel.submit(self.heartbeat.kernel.step, work)

    async def counting(self, work: Callable[[], _T]) -> _T:
        """Runs a step on the thread that only reads the kernel and counts."""
        return await _run(self._counting, self.heartbeat.counting, work)

    async def end(
        self, policy: Callable[[], None], counting: Callable[[], None], kernel: Callable[[], None]
    ) -> None:
        """Runs a last step on each thread: policy; then, when the kernel thread is idle, counting; then kernel.

        Returns when all three have ended. Raises what a last step raises. If it raises or is cancelled, a thread
        may still be at work, and last steps that have not begun never run.
        """
        nothing: Callable[[], None] = lambda: None  # noqa: E731 # typed
        await _last(self._policy, policy)
        # Only now, because a step of the policy thread hands steps over to the kernel thread.
        await asyncio.get_running_loop().run_in_executor(self._kernel, nothing)
        await _last(self._counting, counting)
        await _last(self._kernel, kernel)

    @property
    def all(self) -> tuple[ThreadPoolExecutor, ...]:
        """All three."""
        return self._policy, self._kernel, self._counting

    def close(self) -> None:
        """Accepts no more steps; does not wait for the threads. Idempotent."""
        for thread in self.all:
            thread.shutdown(wait=False)


async def _run(thread: ThreadPoolExecutor, lane: Lane, work: Callable[[], _T]) -> _T:
    """Runs a step on a thread, and records in its lane that it runs."""
    return await asyncio.get_running_loop().run_in_executor(thread, lambda: lane.step(work))


async def _last(thread: ThreadPoolExecutor, work: Callable[[], None]) -> None:
    """Runs a step behind all others of a thread, and accepts no more steps for it."""
    ended = asyncio.get_running_loop().run_in_executor(thread, work)
    thread.shutdown(wait=False)
    await ended
