"""The time that ends of grants are held against: it is never earlier than what the monotonic clock says since the
start, nor than the time at which the policy table was last decided.

So a wall clock that is set back prolongs no grant, and lets nobody in again whose grant had ended: not while the
agent runs, nor by a restart. One that is set forward ends grants early, and no longer than it is wrong.
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

# Clocks that are kept in step, of one host or of two, differ by less.
DRIFT: Final = timedelta(seconds=2)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger("portward")


def utc_now() -> datetime:
    """The wall clock, in UTC."""
    return datetime.now(UTC)


def agent_time(decided: datetime | None) -> datetime:
    """The time that an agent holds ends of grants against, whose policy table was last decided then; for whoever
    looks into the table for a moment. None: there is no table."""
    now = utc_now()
    return now if decided is None else max(now, decided)


def monotonic() -> float:
    """Seconds since the host was booted, also while it sleeps: nobody can set this clock. Every age is taken from
    it, in each process of one boot. A time-out within one process takes `time.monotonic`, which stands while the
    host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def at(moment: float) -> datetime:
    """When the monotonic clock stood at `moment`, by the wall clock as it is set now; in UTC."""
    return utc_now() - timedelta(seconds=monotonic() - moment)


class Stamp(msgspec.Struct, frozen=True):
    """A moment of the monotonic clock that another process can read: `boot` is the kernel's id of this boot, empty
    if the process that made it may not read that."""

    boot: str
    seconds: float

    @classmethod
    def now(cls) -> Stamp:
        """This moment."""
        return cls(boot(), monotonic())

    def age(self) -> float | None:
        """Seconds since then; None if the host was booted since, as far as both sides know the boot."""
        here = boot()
        if self.boot and here and self.boot != here:
            return None
        return max(0.0, monotonic() - self.seconds)


@cache
def boot() -> str:
    """The kernel's id of this boot; empty under the unit, whose /proc holds processes alone (ProcSubset=pid)."""
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
            if not_before - self._start > DRIFT:
                _log.warning(
                    "this host's clock says %s, and the policy table was decided at %s: ends of grants are held "
                    "against the later one (where that was wrong, take the table away: it is read from the store)",
                    f"{self._start:%Y-%m-%d %H:%M:%SZ}", f"{not_before:%Y-%m-%d %H:%M:%SZ}",
                )  # fmt: skip
            self._start = not_before

    def now(self) -> datetime:
        """The time in UTC."""
        return max(self._wall(), self._start + timedelta(seconds=self._monotonic() - self._since))
