"""A process that the daemon starts, and that may outlive it.

asyncio's own subprocesses do not fit. Closing their transport kills the process, and since Python 3.12 a loop that
ends closes all transports. So a worker that should stay would end together with a daemon that fails. Here
`subprocess` starts the process, a descriptor of it (pidfd) becomes readable at its end, and only `kill` ends it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from typing import IO


class Child:
    """One process. Its stdout and stderr are streams; its stdin is the daemon's. Use it on the event loop's
    thread.

    `returncode` is the exit code, or the negative number of the signal that ended the process. It is None until
    the loop has seen the end.
    """

    def __init__(self, argv: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        """Starts the process with the descriptors `pass_fds` open. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=pass_fds)
        self.pid = self._process.pid
        self.returncode: int | None = None
        self.stdout, self.stderr = asyncio.StreamReader(), asyncio.StreamReader()
        self._pipes: list[asyncio.BaseTransport] = []
        self._over = asyncio.Event()
        self._descriptor = -1

    async def watch(self) -> None:
        """Begins to read what the process prints, and to wait for its end. Raises OSError."""
        self._descriptor = os.pidfd_open(self.pid)
        self._loop.add_reader(self._descriptor, self._ended)
        for stream, pipe in ((self.stdout, self._process.stdout), (self.stderr, self._process.stderr)):
            assert pipe is not None  # noqa: S101 # asked for above
            self._pipes.append(await self._reading(stream, pipe))

    async def _reading(self, stream: asyncio.StreamReader, pipe: IO[bytes]) -> asyncio.BaseTransport:
        transport, _ = await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
        return transport

    async def wait(self) -> int:
        """Waits for the end and returns the exit code. Never returns after `leave`."""
        await self._over.wait()
        assert self.returncode is not None  # noqa: S101 # by `_ended`
        return self.returncode

    def kill(self) -> None:
        """Ends the process by force; does nothing if it has ended. Its process id cannot belong to another
        process, because the kernel keeps it until `_ended` has waited for it."""
        self._process.kill()

    def leave(self) -> None:
        """Lets the process go on without the daemon; nothing reads what it prints. Idempotent."""
        self._close_descriptor()
        for pipe in self._pipes:
            pipe.close()

    def discard(self) -> None:
        """Ends a process that `watch` has failed for."""
        self._process.kill()
        self._process.wait()
        self.leave()

    def _ended(self) -> None:
        self.returncode = self._process.wait()
        self._close_descriptor()
        self._over.set()

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


async def start(argv: Sequence[str], pass_fds: Sequence[int] = ()) -> Child:
    """Starts a process and watches it. Raises OSError, and then no process runs."""
    child = Child(argv, pass_fds)
    try:
        await child.watch()
    except BaseException:
        child.discard()
        raise
    return child
