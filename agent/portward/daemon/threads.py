"""The three threads of the daemon: policy, kernel, counting. Each runs one step at a time, in the order of the
calls.

The event loop waits for their steps. To cancel such a wait does not end a step that has begun. So before a lock is
given up that the steps need, `end` must have returned; what they use is closed by its last steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from portward.base.heartbeat import Heartbeat, Lane

_T = TypeVar("_T")


class Threads:
    """The threads; each begins with its first step."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()
        self._policy, self._kernel, self._counting = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) for name in ("policy", "kernel", "counting")
        )

    async def policy(self, work: Callable[[], _T]) -> _T:
        """Runs a step on the thread that alone writes the policy table."""
        return await _run(self._policy, self.heartbeat.policy, work)

    async def kernel(self, work: Callable[[], _T]) -> _T:
        """Runs a step on the thread that alone writes the kernel."""
        return await _run(self._kernel, self.heartbeat.kernel, work)

    def on_kernel(self, work: Callable[[], _T]) -> Future[_T]:
        """The same for the policy thread, which need not wait."""
        return self._kernel.submit(self.heartbeat.kernel.step, work)

    async def counting(self, work: Callable[[], _T]) -> _T:
        """Runs a step on the thread that only reads and counts."""
        return await _run(self._counting, self.heartbeat.counting, work)

    async def end(
        self, policy: Callable[[], None], counting: Callable[[], None], kernel: Callable[[], None]
    ) -> None:
        """Runs a last step on the policy thread, then one on the counting thread when the kernel thread is
        idle, then one on the kernel thread. Returns when all three have ended. Raises what a last step
        raised; then, and if this is cancelled, a thread may still be at work, and a last step that has not begun
        never does."""
        nothing: Callable[[], None] = lambda: None  # noqa: E731 # typed
        await _last(self._policy, policy)
        # Not before: a step of the policy thread hands steps to the kernel thread.
        await asyncio.get_running_loop().run_in_executor(self._kernel, nothing)
        await _last(self._counting, counting)
        await _last(self._kernel, kernel)

    @property
    def all(self) -> tuple[ThreadPoolExecutor, ...]:
        """The three of them."""
        return self._policy, self._kernel, self._counting

    def close(self) -> None:
        """Lets no thread begin another step that it was not given before; waits for none. Idempotent."""
        for thread in self.all:
            thread.shutdown(wait=False)


async def _run(thread: ThreadPoolExecutor, lane: Lane, work: Callable[[], _T]) -> _T:
    """Runs a step on a thread, and notes in its lane that it is at it."""
    return await asyncio.get_running_loop().run_in_executor(thread, lambda: lane.step(work))


async def _last(thread: ThreadPoolExecutor, work: Callable[[], None]) -> None:
    """Runs a step behind all others of a thread, which from here on takes no other."""
    ended = asyncio.get_running_loop().run_in_executor(thread, work)
    thread.shutdown(wait=False)
    await ended
