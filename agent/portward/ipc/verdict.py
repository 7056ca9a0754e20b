"""What a lookup result means to the kernel: the class of the verdict, and how the packet is counted. Pure.

The worker asks it for each packet. The daemon asks it for a verdict that the kernel cannot learn from a mark, and
the verbs ask it for what would become of a packet.
"""

from __future__ import annotations

from portward.ipc import mark
from portward.ipc.counters import PacketOutcome
from portward.model import Reason
from portward.table.reader import LookupResult


def classify(result: LookupResult) -> tuple[mark.Class, PacketOutcome]:
    """The class of verdict for a lookup result, and how the packet is counted. A DEFERRED packet is dropped
    without a verdict mark, because the daemon must write the rate limit first."""
    if result.reason.allows:
        if result.limited and not result.observed:
            return mark.Class.ALLOW, PacketOutcome.DEFERRED
        return mark.Class.ALLOW, PacketOutcome.PASSED
    if result.observed:
        return mark.Class.OBSERVED, PacketOutcome.OBSERVED
    if result.reason is Reason.DENIED_UNKNOWN_SOURCE:
        return mark.Class.UNKNOWN, PacketOutcome.DROPPED
    if result.reject:
        return mark.Class.REFUSED, PacketOutcome.RESET
    return mark.Class.DENY, PacketOutcome.DROPPED
