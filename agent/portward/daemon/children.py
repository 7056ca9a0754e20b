"""A process that the daemon starts, and that may outlive it.

asyncio's own subprocesses do not fit: closing their transport kills the process, and since Python 3.12 a loop that
ends closes the transports of all. A worker that is to stay would end with a daemon that ends by an error. So
`subprocess` starts the process here, a descriptor of it (pidfd) says when it has ended, and only `kill` ends it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from typing import IO


class Child:
    """One process. Its stdout and stderr are streams, its stdin is the daemon's. For the event loop's thread.

    `returncode` is None until the loop has seen the end: the exit code, or less the number of the signal.
    """

    def __init__(self, argv: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        """Starts the process, which gets these descriptors too; raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=pass_fds)
        self.pid = self._process.pid
        self.returncode: int | None = None
        self.stdout, self.stderr = asyncio.StreamReader(), asyncio.StreamReader()
        self._pipes: list[asyncio.BaseTransport] = []
        self._over = asyncio.Event()
        self._descriptor = -1

    async def watch(self) -> None:
        """Reads what the process prints, and waits for its end; raises OSError."""
        self._descriptor = os.pidfd_open(self.pid)
        self._loop.add_reader(self._descriptor, self._ended)
        for stream, pipe in ((self.stdout, self._process.stdout), (self.stderr, self._process.stderr)):
            assert pipe is not None  # noqa: S101 # asked for above
            self._pipes.append(await self._reading(stream, pipe))

    async def _reading(self, stream: asyncio.StreamReader, pipe: IO[bytes]) -> asyncio.BaseTransport:
        transport, _ = await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
        return transport

    async def wait(self) -> int:
        """Waits for the end; gives the exit code. Never returns after `leave`."""
        await self._over.wait()
        assert self.returncode is not None  # noqa: S101 # by `_ended`
        return self.returncode

    def kill(self) -> None:
        """Ends the process by force; nothing happens if it has ended. Until the end is seen here, its number is
        nobody else's."""
        self._process.kill()

    def leave(self) -> None:
        """Leaves the process alone: it goes on, and nobody reads what it prints. Idempotent."""
        self._forget()
        for pipe in self._pipes:
            pipe.close()

    def discard(self) -> None:
        """Ends a process that cannot be watched."""
        self._process.kill()
        self._process.wait()
        self.leave()

    def _ended(self) -> None:
        self.returncode = self._process.wait()
        self._forget()
        self._over.set()

    def _forget(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


async def start(argv: Sequence[str], pass_fds: Sequence[int] = ()) -> Child:
    """Starts a process; it is watched, and what it prints is read. Raises OSError, and then none runs."""
    child = Child(argv, pass_fds)
    try:
        await child.watch()
    except BaseException:
        child.discard()
        raise
    return child
