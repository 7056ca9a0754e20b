"""Verdicts, and the bits of the packet mark that carry them. Does no I/O.

portward owns the low 16 bits, and only between its two prerouting chains (both at priority raw − 2; no chain of
another program stands between them). Chain `screen` writes PASSED or a miss into every packet that goes from a
segment to a policy port and is not dropped. The worker writes its verdict. Chain `learn` clears the bits again,
and drops a packet that comes without one of these values. All other bits belong to other programs (policy routing,
kube-proxy, VPNs) and stay as they are, also in the worker.

The low half was chosen because well-known programs use high bits. kube-proxy sets 0x4000 and 0x8000 later, at
mangle and nat, so they do not meet ours.

    bit  15 … 3   epoch of the policy under which the verdict was found (0 … 8190)
    bit   2 … 0   class of the verdict

`rules/nftables/portward.nft` holds the same layout as `define`s, and a test asserts that both agree.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from portward.model import Reason
from portward.table.layout import LookupResult

OWN: Final = 0x0000FFFF
KEEP: Final = 0xFFFF0000
CLASS: Final = 0x00000007
EPOCH: Final = 0x0000FFF8
EPOCH_SHIFT: Final = 3
# Epoch 8191 (all ones) is never used, so that a miss is never a verdict.
EPOCHS: Final = 8191
# How many generations the policy table may be ahead of the kernel: 24 = 240 commits a second × 0.1 s. The store
# commits about 240 single changes a second, and 0.1 s is the longest that the kernel thread usually needs for one.
# If it is slower, packets with a verdict from further ahead are dropped, and the sender retries. Each value more
# is one that another program's mark may have by chance.
AHEAD: Final = 24


class Class(IntEnum):
    """The class of a verdict: the kernel acts on it and caches it. The last two are no verdicts."""

    ALLOW = 1
    DENY = 2
    REFUSED = 3  # the worker has sent the RST itself
    ANSWER = 4  # answered, but nothing is cached: a query of the self-check, or a rate limit must be written first
    UNKNOWN = 5
    OBSERVED = 6  # would be denied, but is only observed: passes
    OPEN = 7  # in MISS_OPEN alone


# The classes that let packets out once they are cached.
PASSING: Final = (Class.ALLOW, Class.OBSERVED)
# Asks a worker; dropped without an answer.
MISS: Final = EPOCH | Class.ANSWER
# Asks a worker; passes without an answer (observed segments, on_agent_down = "open").
MISS_OPEN: Final = EPOCH | Class.OPEN
# A query of the self-check. The answer is class ANSWER with the epoch that the worker sees.
PROBE: Final = EPOCH
# Chain `screen` lets the packet pass without asking a worker. No worker writes it: its epoch is never in force.
PASSED: Final = EPOCH | Class.ALLOW
# A source that is cached as rejected sent again. The kernel has counted the packet and asks for a reset.
AGAIN: Final = EPOCH | Class.REFUSED


class PacketOutcome(IntEnum):
    """The outcome of a packet. The numbers are places in the shared block. A number is never given to another
    outcome."""

    PASSED = 0
    DROPPED = 1
    RESET = 2
    OBSERVED = 3  # would have been dropped
    DEFERRED = 4  # dropped until the kernel knows the rate limit of its source


def epoch_of(generation: int) -> int:
    """The epoch (0 … 8190) of a generation of the policy table."""
    return generation % EPOCHS


def coming(epoch: int, number: int = AHEAD) -> list[int]:
    """The `number` epochs that follow an epoch."""
    return [(epoch + step) % EPOCHS for step in range(1, number + 1)]


def stamp(mark: int, verdict: Class, epoch: int) -> int:
    """The mark with a verdict: other programs' bits of `mark`, and our class and epoch."""
    return (mark & KEEP) | (epoch << EPOCH_SHIFT) | verdict


def classify(result: LookupResult) -> tuple[Class, PacketOutcome]:
    """The class of verdict for a lookup result, and how the packet is counted. A DEFERRED packet is dropped
    without a verdict mark, because the daemon must write the rate limit first."""
    if result.reason.allows:
        if result.limited and not result.observed:
            return Class.ALLOW, PacketOutcome.DEFERRED
        return Class.ALLOW, PacketOutcome.PASSED
    if result.observed:
        return Class.OBSERVED, PacketOutcome.OBSERVED
    if result.reason is Reason.DENIED_UNKNOWN_SOURCE:
        return Class.UNKNOWN, PacketOutcome.DROPPED
    if result.reject:
        return Class.REFUSED, PacketOutcome.RESET
    return Class.DENY, PacketOutcome.DROPPED
