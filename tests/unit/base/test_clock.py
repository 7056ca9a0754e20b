"""A wall clock that jumps lets no source pass too early."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import pytest

from portward.base.clock import Clock, monotonic, utc_now

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


class Host:
    """A wall clock that can be set, and a monotonic one that cannot."""

    def __init__(self) -> None:
        self.wall, self.seconds = NOON, 1000.0

    def clock(self, not_before: datetime | None = None) -> Clock:
        return Clock(not_before, lambda: self.wall, lambda: self.seconds)

    def passes(self, time: timedelta) -> None:
        self.wall += time
        self.seconds += time.total_seconds()


@pytest.fixture
def host() -> Host:
    return Host()


def test_it_goes_with_the_wall_clock(host: Host) -> None:
    clock = host.clock()
    host.passes(HOUR)
    assert clock.now() == NOON + HOUR


def test_a_wall_clock_that_is_set_back_does_not_turn_time_back(host: Host) -> None:
    clock = host.clock()
    host.passes(HOUR)
    host.wall -= 5 * HOUR
    assert clock.now() == NOON + HOUR
    host.passes(HOUR)
    assert clock.now() == NOON + 2 * HOUR


def test_a_wall_clock_that_stands_still_does_not_stop_time(host: Host) -> None:
    clock = host.clock()
    host.seconds += 3600
    assert clock.now() == NOON + HOUR


def test_one_that_was_set_forward_by_mistake_is_followed_back(host: Host) -> None:
    clock = host.clock()
    host.wall += 24 * HOUR
    assert clock.now() == NOON + 24 * HOUR
    host.wall -= 24 * HOUR
    host.passes(HOUR)
    assert clock.now() == NOON + HOUR


def test_a_restart_does_not_turn_time_back_behind_the_table(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.wall = datetime(1970, 1, 1, tzinfo=UTC)  # a board without a battery
    with caplog.at_level(logging.WARNING):
        clock = host.clock(not_before=NOON)
    assert clock.now() == NOON
    assert "1970-01-01 00:00:00Z" in caplog.text
    host.passes(HOUR)
    assert clock.now() == NOON + HOUR
    host.wall = NOON + 3 * HOUR  # NTP has set the clock
    assert clock.now() == NOON + 3 * HOUR


def test_a_table_of_a_moment_ahead_is_not_worth_a_word(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert host.clock(not_before=NOON + timedelta(seconds=1)).now() == NOON + timedelta(seconds=1)
    assert not caplog.text


def test_the_real_clocks_go() -> None:
    before, since = utc_now(), monotonic()
    assert before <= Clock(None).now() <= utc_now()
    assert monotonic() >= since
