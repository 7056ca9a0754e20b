"""How the daemon ends: its jobs within a bound, its process also while a thread is at work."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Any, NoReturn

from portward.errors import PortwardError


async def cancelled(tasks: set[asyncio.Future[Any]], seconds: float) -> None:
    """Cancels tasks and waits until they have ended, but at most for these seconds. Ignores what they raise."""
    for task in tasks:
        task.cancel()
        # Else asyncio reports an exception that nothing has asked for.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    await asyncio.wait(tasks, timeout=seconds)


def end(error: BaseException | None) -> NoReturn:
    """Ends the process at once, and with it the threads that are at work. Prints `error` as the program does, and
    gives its exit code; 0 if there is none.

    Python's own end would wait for those threads.
    """
    code = 1
    try:
        if error is None:
            code = 0
        elif isinstance(error, PortwardError):
            code = error.exit_code
            for line in error.lines():
                print(f"portward: {line}", file=sys.stderr)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        logging.shutdown()
    finally:
        os._exit(code)
