"""The numbers of the reasons, in rows of the policy table and in the counters of workers.

A reason keeps its number for ever. A new reason gets the next free number, whatever its place in the enum is. The
number of a removed reason is never used again, because old rows may still contain it.

The last number is 31. To have more, raise `REASON_BITS`; that changes the rows, so raise `FORMAT` in
`table/layout.py` too. Each agent then reads its table from the store again at its next start.
"""

from __future__ import annotations

from typing import Final

from portward.model import Reason

# The width of a reason's number in a row of the policy table.
REASON_BITS: Final = 5
# 0 is not a reason, so that a row of zeros is not read as one.
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
