"""What a lookup result means to the kernel: the class of the verdict, and how the packet is counted. Pure.

The worker asks it for each packet. The daemon asks it for a verdict that the kernel cannot learn from a mark, and
the verbs ask it for what would become of a packet.
"""

from __future__ import annotations

from portward.ipc import mark
from portward.ipc.counters import PacketOutcome
from portward.model import Reason
from portward.table.reader import LookupResult


def classify(finding: LookupResult) -> tuple[mark.Class, PacketOutcome]:
    """What the kernel is told for a finding, and how it is counted. What is DEFERRED is dropped, and not cached:
    the daemon has to write the limit first."""
    if finding.reason.allows:
        if finding.limited and not finding.observed:
            return mark.Class.ALLOW, PacketOutcome.DEFERRED
        return mark.Class.ALLOW, PacketOutcome.PASSED
    if finding.observed:
        return mark.Class.OBSERVED, PacketOutcome.OBSERVED
    if finding.reason is Reason.DENIED_UNKNOWN_SOURCE:
        return mark.Class.UNKNOWN, PacketOutcome.DROPPED
    if finding.reject:
        return mark.Class.REFUSED, PacketOutcome.RESET
    return mark.Class.DENY, PacketOutcome.DROPPED
