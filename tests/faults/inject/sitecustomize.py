"""Injects faults into portward's processes. Python imports this module at its start if PYTHONPATH names this
folder.

The folder of the environment variable PORTWARD_FAULTS has the orders, which the processes read while they run:

    armed     `process|where|side|nth|action`. A process of the kind `process` carries out the action once, on the
              side `before` or `after` of the nth call of the function `where`; it renames the file to `hit` first.
              An action is the name of a signal, which the process sends to itself; or `memory`, which raises
              MemoryError; or `table`, which raises the error of an unreadable policy table and so ends an agent;
              or `hold`, which waits until something is written to `held`
    held      a named pipe
    shift     seconds that are added to the wall clock of the daemon
    rules/    ruleset files that the daemon uses instead of the shipped ones
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).parent))

from points import POINTS, Point, find  # type: ignore[import-not-found] # the path above must be there first

_FOLDER = Path(os.environ["PORTWARD_FAULTS"])
_ARMED, _HIT, _HELD, _SHIFT, _RULES = (_FOLDER / name for name in ("armed", "hit", "held", "shift", "rules"))
_LOCK = threading.Lock()
_passed: dict[str, int] = {}


def _kind_of_process() -> str | None:
    words = sys.orig_argv
    if "portward.worker.process" in words:
        return "worker"
    return next((kind for verb, kind in (("run", "daemon"), ("apply", "apply")) if verb in words), None)


def _pass(where: str, side: str) -> None:
    """Carries out the armed action if it is for this process, this function and this side."""
    try:
        order = _ARMED.read_text()
    except OSError:
        return
    process, armed, wanted, nth, action = order.split("|")
    if (process, armed, wanted) != (_PROCESS, where, side):
        return
    with _LOCK:
        _passed[order] = _passed.get(order, 0) + 1
        if _passed[order] < int(nth):
            return
        _passed[order] = 0
    try:
        _ARMED.rename(_HIT)  # one process only, and only once
    except OSError:
        return
    if action == "memory":
        raise MemoryError
    if action == "table":
        raise importlib.import_module("portward.table.database").TableError("the policy table cannot be read")
    if action == "hold":
        _HELD.read_bytes()
        return
    os.kill(os.getpid(), getattr(signal, action))


def _wrapped(where: str, function: Any) -> Any:
    if isinstance(function, classmethod):
        return classmethod(_wrapped(where, function.__func__))
    if hasattr(function, "__code__") and function.__code__.co_flags & 0x80:  # CO_COROUTINE

        @functools.wraps(function)
        async def waits(*arguments: Any, **options: Any) -> Any:
            _pass(where, "before")
            found = await function(*arguments, **options)
            _pass(where, "after")
            return found

        return waits

    @functools.wraps(function)
    def plain(*arguments: Any, **options: Any) -> Any:
        _pass(where, "before")
        found = function(*arguments, **options)
        _pass(where, "after")
        return found

    return plain


def _wrap(point: Point) -> None:
    holder, name, function = find(point)
    setattr(holder, name, _wrapped(point.where, function))


def _seconds() -> float:
    try:
        return float(_SHIFT.read_text() or 0)
    except OSError:
        return 0.0


def _shift_clock() -> None:
    """Shifts the wall clock as portward reads it, by the seconds of `shift`. The kernel's clocks, the monotonic
    clock and `datetime` in other libraries stay right."""
    real: Callable[[], float] = time.time

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=_seconds())

    module: Any = importlib.import_module("portward.base.clock")
    module.datetime = Shifted
    time.time = lambda: real() + _seconds()


def _replace_rules() -> None:
    resources: Any = importlib.import_module("portward.base.resources")
    shipped = resources.rules

    def rules(*parts: str) -> Path:
        other = _RULES.joinpath(*parts)
        found: Path = other if other.exists() else shipped(*parts)
        return found

    resources.rules = rules


_PROCESS = _kind_of_process()
for _point in {point.where: point for point in POINTS if point.process == _PROCESS}.values():
    _wrap(_point)
if _PROCESS == "daemon":
    _shift_clock()
    _replace_rules()
