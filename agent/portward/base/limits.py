"""The limits of policy values, for every input: flags, YAML, JSON, TOML, and rows that other tools wrote.

All inputs are checked against these, directly or by `model.py` and `validity.py`. So no value enters that the
policy table, a worker or the kernel cannot hold. Never lower a limit: records that a store already has would be
refused, and their customers cut off.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

# The policy table stores times as microseconds since 1970, and 0 means none. One day at each end is a margin, so
# that Python can represent the time in every time zone.
FIRST_TIME: Final = datetime(1970, 1, 2, tzinfo=UTC)
LAST_TIME: Final = datetime(9999, 12, 30, tzinfo=UTC)
# How far a time may lie ahead of this host's clock: synchronised clocks of two hosts differ by less.
CLOCK_DRIFT: Final = timedelta(seconds=2)

# More than all the mail of the world (some 4 * 10^11). MessagePack has no integers beyond 64 bits.
MAX_MESSAGES_PER_DAY: Final = 10**12

# New connections. nftables stores a rate as nanoseconds for each in 64 bits, and a burst in 32 bits.
MAX_RATE_PER_MINUTE: Final = 1_000_000
MAX_BURST: Final = 100_000

# For texts that are one line on a screen: names of customers, offers, software, hosts, persons.
MAX_NAME_CHARS: Final = 1_000
# For justifications, reasons, notes. Each gateway stores them in its table, and reads them whenever it decides the
# subscription again.
MAX_TEXT_CHARS: Final = 100_000

# SQLite's integers have 63 bits and a sign; the next revision must still be one.
MAX_REVISION: Final = 2**63 - 2

# Between two readings of `top`. Each reads the whole verdict cache of the kernel; an infinite sleep raises an
# error.
MIN_INTERVAL_S: Final = 0.2
MAX_INTERVAL_S: Final = 86_400.0

# Half of a UTF-16 pair. In a Python text it stands for a byte that was not UTF-8, and cannot be encoded as UTF-8.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def time_problem(at: datetime) -> str | None:
    """The problem of an aware time; None if it can be stored. Never raises, even at the ends of Python's
    range."""
    if FIRST_TIME <= at <= LAST_TIME:
        return None
    return f"{at.isoformat()} is out of range: from {FIRST_TIME:%Y-%m-%d} to {LAST_TIME:%Y-%m-%d}"


def text_problem(text: str, longest: int) -> str | None:
    """The problem of a text of at most `longest` characters; None if it can be stored."""
    if len(text) > longest:
        return f"{len(text)} characters are too many: at most {longest} are kept"
    if not text.isascii() and _SURROGATE.search(text):
        return f"{text[:MAX_NAME_CHARS]!a} holds bytes that are not UTF-8"
    return None


def number_problem(number: int, most: int) -> str | None:
    """The problem of a whole number from 1 to `most`; None if it can be stored."""
    if 1 <= number <= most:
        return None
    # Python refuses to convert a number of more than 4,300 digits to text.
    shown = str(number) if number.bit_length() <= 256 else f"a number of {number.bit_length()} bits"
    return f"{shown} is out of range: from 1 to {most}"
