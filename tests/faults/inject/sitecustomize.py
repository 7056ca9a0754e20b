"""Python imports this at its start where PYTHONPATH names this folder. portward's processes then look into the
folder PORTWARD_FAULTS while they run:

    armed     `process|where|before or after|nth|action`: the process takes the file away and ends itself there by
              a signal; or, with `memory`, has no memory; or, with `table`, cannot read the policy table, which
              ends an agent; or, with `hold`, stays there until `held` is written to
    held      a named pipe
    shift     seconds by which the wall clock of the daemon is wrong
    rules/    ruleset files that it takes instead of the shipped ones
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
    """Ends this process if just this place is armed."""
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
    """The wall clock as portward reads it; that of other libraries, the kernel's and the monotonic one stay."""
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
