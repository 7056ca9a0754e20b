"""The clock that decides when a grant has ended. It is never earlier than its start plus the time that the
monotonic clock has counted since, nor than the time at which the policy table was last decided.

So a wall clock that is set back neither prolongs a grant nor revives one that has ended: not while the agent runs,
and not by a restart. A wall clock that is set forward ends grants early, but only while it is wrong.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

from portward.base.limits import CLOCK_DRIFT

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger("portward")


def utc_now() -> datetime:
    """The wall clock, in UTC."""
    return datetime.now(UTC)


def agent_time(decided: datetime | None) -> datetime:
    """The time of an agent's clock, if its policy table was last decided at `decided`; None if there is no table.
    For verbs that read the table."""
    now = utc_now()
    return now if decided is None else max(now, decided)


def monotonic() -> float:
    """Seconds since the host booted, including the time that it slept. This clock cannot be set, and is the same
    in all processes of one boot, so every age is computed with it. Timeouts within one process use
    `time.monotonic`, which stops while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def at(moment: float) -> datetime:
    """The wall time, in UTC, at which the monotonic clock was `moment`, by the present setting of the wall
    clock."""
    return utc_now() - timedelta(seconds=monotonic() - moment)


class Stamp(msgspec.Struct, frozen=True):
    """A time of the monotonic clock for another process: `seconds` since boot, and the kernel's id of this `boot`,
    empty if the process that made the stamp may not read it."""

    boot: str
    seconds: float

    @classmethod
    def now(cls) -> Stamp:
        """The present time."""
        return cls(boot(), monotonic())

    def age(self) -> float | None:
        """Seconds since then; None if both processes know the boot and it is another one."""
        here = boot()
        if self.boot and here and self.boot != here:
            return None
        return max(0.0, monotonic() - self.seconds)


@cache
def boot() -> str:
    """The kernel's id of this boot; empty under the systemd unit, because its /proc shows only processes
    (ProcSubset=pid)."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""


class Clock:
    """The clock of a running gateway."""

    def __init__(
        self,
        not_before: datetime | None,
        wall: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = monotonic,
    ) -> None:
        """`not_before` is when the policy table was last decided."""
        self._wall, self._monotonic = wall, monotonic
        self._start, self._since = wall(), monotonic()
        if not_before is not None and not_before > self._start:
            if not_before - self._start > CLOCK_DRIFT:
                _log.warning(
                    "this host's clock says %s, and the policy table was decided at %s: ends of grants are held "
                    "against the later one (where that was wrong, take the table away: it is read from the store)",
                    f"{self._start:%Y-%m-%d %H:%M:%SZ}", f"{not_before:%Y-%m-%d %H:%M:%SZ}",
                )  # fmt: skip
            self._start = not_before

    def now(self) -> datetime:
        """The time in UTC."""
        return max(self._wall(), self._start + timedelta(seconds=self._monotonic() - self._since))
