"""Numbers and times in sentences for operators, in English."""

from __future__ import annotations

from datetime import datetime


def counted(number: float, one: str, many: str = "") -> str:
    """A number with its noun: `1 packet`, `2 packets`; `many` if an s does not make the plural."""
    return f"{number:.0f} {one if number == 1 else many or one + 's'}"


def times(number: float) -> str:
    """How often: `once`, `2 times`."""
    return "once" if number == 1 else f"{number:.0f} times"


def utc(at: datetime) -> str:
    """A time in UTC: `2026-01-31 09:30:00Z`."""
    return f"{at:%Y-%m-%d %H:%M:%SZ}"


def utc_as_typed(at: datetime) -> str:
    """A time in UTC as inventories and options take it: `2026-01-31T09:30:00Z`."""
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"
