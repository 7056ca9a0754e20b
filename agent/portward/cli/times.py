"""Times on the command line."""

from __future__ import annotations

from datetime import UTC, date, datetime

from portward.base.limits import time_problem
from portward.errors import InputError


def instant(text: str | None, field: str) -> datetime | None:
    """A time in UTC from a text such as `2027-01-09T12:00:00Z`, or from a date, which means its beginning; None
    for None. Raises InputError with the field."""
    if text is None:
        return None
    found = _read(text, field)
    # Before the conversion to UTC, in which the time may be out of Python's range.
    if (problem := time_problem(found)) is not None:
        raise InputError(problem, field=field)
    return found.astimezone(UTC)


def _read(text: str, field: str) -> datetime:
    try:
        day = date.fromisoformat(text)
        return datetime(day.year, day.month, day.day, tzinfo=UTC)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{text!r} is no time: 2027-01-09T12:00:00Z or 2027-01-09 would be", field=field
        ) from None
    if found.tzinfo is None:
        raise InputError(f"{text!r} has no time zone: {text}Z is the time in UTC", field=field)
    return found
