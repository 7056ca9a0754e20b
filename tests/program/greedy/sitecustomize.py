"""Python imports this module before the agent. At SIGUSR2 the agent opens all descriptors that its limit still
allows. After SIGUSR1 it can start no thread."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from typing import Final

_FEW: Final = 64
_taken: list[int] = []


def _take_all(*_: object) -> None:
    # The limit bounds the numbers of descriptors, so it must lie above all that are open.
    highest = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208 # pathlib takes long to load
    limit = min(highest + _FEW, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with contextlib.suppress(OSError):
        while True:
            _taken.append(os.eventfd(0))


def _no_thread(*_: object) -> None:
    import _thread
    import threading

    def refuse(*_: object, **__: object) -> int:
        raise RuntimeError("can't start new thread")

    _thread.start_new_thread = refuse
    threading._start_new_thread = refuse  # type: ignore[attr-defined]


if "run" in sys.orig_argv:
    signal.signal(signal.SIGUSR2, _take_all)
    signal.signal(signal.SIGUSR1, _no_thread)
