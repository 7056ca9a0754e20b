"""What a value of the policy may be at most, for every way in: flags, YAML, JSON, TOML, and rows that other tools
wrote.

Whatever takes a value asks here, directly or by `model.py` and `validity.py`; so nothing is taken in that the
policy table, a worker or the kernel cannot hold. Each limit has its reason beside it. Never lower a limit: a
record that a store has already would be refused, and its customer cut off.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

# Times lie in the policy table as microseconds since 1970, of which 0 means none. A day at each end is left for
# time zones: in every zone, such a time is one that Python can hold.
FIRST_TIME: Final = datetime(1970, 1, 2, tzinfo=UTC)
LAST_TIME: Final = datetime(9999, 12, 30, tzinfo=UTC)

# Messages a day: more than all the mail of the world (some 4 * 10^11). MessagePack has no integer beyond 64 bits.
MAX_MESSAGES_PER_DAY: Final = 10**12

# New connections a minute. nftables keeps a rate in 64 bits as nanoseconds for each, and a burst in 32 bits.
MAX_RATE_PER_MINUTE: Final = 1_000_000
MAX_BURST: Final = 100_000

# Characters of what is one line on a screen: names of customers, offers, software, hosts, persons.
MAX_NAME_CHARS: Final = 1_000
# Characters of what people write: justifications, reasons, notes. It lies in each gateway's table, and a gateway
# reads it whenever it decides the subscription again.
MAX_TEXT_CHARS: Final = 100_000

# SQLite's integers have 63 bits and a sign; the next revision must still be one.
MAX_REVISION: Final = 2**63 - 2

# Seconds between two readings of `top`. Each reads all that the kernel has cached, and no sleep is infinite.
MIN_INTERVAL_S: Final = 0.2
MAX_INTERVAL_S: Final = 86_400.0

# Half of a pair of UTF-16. In a text it stands for a byte that was no UTF-8, and no file or socket takes it.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def time_problem(at: datetime) -> str | None:
    """What is wrong with an aware time; None if it can be kept. Never raises, however near the end of all time."""
    if FIRST_TIME <= at <= LAST_TIME:
        return None
    return f"{at.isoformat()} is out of range: from {FIRST_TIME:%Y-%m-%d} to {LAST_TIME:%Y-%m-%d}"


def text_problem(text: str, longest: int) -> str | None:
    """What is wrong with a text of at most `longest` characters; None if it can be kept."""
    if len(text) > longest:
        return f"{len(text)} characters are too many: at most {longest} are kept"
    if not text.isascii() and _SURROGATE.search(text):
        return f"{text[:MAX_NAME_CHARS]!a} holds bytes that are not UTF-8"
    return None


def number_problem(number: int, most: int) -> str | None:
    """What is wrong with a whole number from 1 to `most`; None if it can be kept."""
    if 1 <= number <= most:
        return None
    # Python turns no number of more than 4,300 digits into text.
    told = str(number) if number.bit_length() <= 256 else f"a number of {number.bit_length()} bits"
    return f"{told} is out of range: from 1 to {most}"
