"""How the daemon ends: its jobs within a time limit, and its process even while a thread is at work."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Any, NoReturn

from portward.errors import PortwardError


async def cancel(tasks: set[asyncio.Future[Any]], seconds: float) -> None:
    """Cancels tasks and waits until they have ended, at most `seconds`. Ignores what they raise."""
    for task in tasks:
        task.cancel()
        # Otherwise asyncio logs an exception that no caller has fetched.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    await asyncio.wait(tasks, timeout=seconds)


def exit_now(error: BaseException | None) -> NoReturn:
    """Ends the process at once, with the threads that are at work. Prints `error` as the program does, and exits
    with its exit code; with 0 if there is no error.

    Python's own exit would wait for these threads.
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
