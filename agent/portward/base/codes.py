"""The numbers by which reasons are written: into rows of the policy table, and into the counters of workers.

A number stands for its reason for ever. A new reason takes the next free number, wherever its place in the enum
is. The number of a reason that is gone is never given again, because rows that were written with it may still be
there.
"""

from __future__ import annotations

from typing import Final

from portward.model import Reason

# Bits that hold a reason's number.
REASON_BITS: Final = 5
# As many numbers as fit. 0 is no reason, so that a row of zeros is not taken for one.
REASON_NUMBERS: Final = 1 << REASON_BITS

REASON_NUMBER: Final[dict[Reason, int]] = {
    Reason.ALLOWED_OFFER: 1,
    Reason.ALLOWED_GRANDFATHERED: 2,
    Reason.ALLOWED_EXEMPT: 3,
    Reason.ALLOWED_INTERNAL: 4,
    Reason.DENIED_NOT_EXEMPT: 5,
    Reason.DENIED_INELIGIBLE: 6,
    Reason.DENIED_PENDING: 7,
    Reason.DENIED_REJECTED: 8,
    Reason.DENIED_REVOKED: 9,
    Reason.DENIED_RESTART_REQUIRED: 10,
    Reason.DENIED_PAAS: 11,
    Reason.DENIED_DISABLED: 12,
    Reason.DENIED_UNKNOWN_SOURCE: 13,
}
REASON_OF: Final[dict[int, Reason]] = {number: reason for reason, number in REASON_NUMBER.items()}
