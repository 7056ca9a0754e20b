"""The bits of the packet mark that portward owns, and what they say.

portward owns the low 16 bits, and only between its two prerouting chains (both at priority raw − 2, with no chain
of others between them): the screen writes PASSED or a miss on every packet of a segment to a judged port that it
does not drop, the worker writes its verdict, the learning chain clears the bits again. What comes to the learning
chain without one of these is dropped. All other bits belong to somebody else (policy routing,
kube-proxy, fwmarks of VPNs) and are kept, by the worker too. The low half was taken since the well-known
users of marks take high bits (kube-proxy 0x4000 and 0x8000 are set later, at mangle and nat, and so do
not meet ours).

    bit  15 … 3   epoch of the policy under which the verdict was found (0 … 8190)
    bit   2 … 0   class of the verdict

`rules/nftables/portward.nft` holds the same layout as `define`s; a test says that both agree.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

OWN: Final = 0x0000FFFF
KEEP: Final = 0xFFFF0000
CLASS: Final = 0x00000007
EPOCH: Final = 0x0000FFF8
EPOCH_SHIFT: Final = 3
# Epoch 8191 (all ones) is never used, so that a miss is no verdict of any epoch.
EPOCHS: Final = 8191
# How many generations the policy table may be ahead of the kernel: some 240 changes a second are committed one by
# one, and the kernel thread seldom takes 100 ms over one of them. Verdicts from further ahead are dropped, and the
# sender tries again. Not more than needed, because each is a value that another program's mark may have by chance.
AHEAD: Final = 24


class Class(IntEnum):
    """What a verdict tells the kernel to do and to remember; MISS and MISS_OPEN ask for a verdict."""

    ALLOW = 1
    DENY = 2
    REFUSED = 3  # the worker has sent the RST itself
    MISS = 4  # asked; dropped where nobody answers. With an epoch: answered, but the limit is to be written first
    UNKNOWN = 5
    OBSERVED = 6  # would be denied, but is only observed: passes
    MISS_OPEN = 7  # asked; passes where nobody answers (observed segments, on_agent_down = "open")


# Remembered, these let packets out.
PASSING: Final = (Class.ALLOW, Class.OBSERVED)
MISS: Final = EPOCH | Class.MISS
# A query of the self-check; its answer is class MISS with the epoch that the worker sees.
PROBE: Final = EPOCH
MISS_OPEN: Final = EPOCH | Class.MISS_OPEN
# The screen lets the packet pass and no worker is asked. No worker writes it, since its epoch is never in force.
PASSED: Final = EPOCH | Class.ALLOW
# A source that is cached as rejected has sent once more: the packet is counted, and a reset is asked for.
AGAIN: Final = EPOCH | Class.REFUSED


def epoch_of(generation: int) -> int:
    """The epoch (0 … 8190) of a generation of the policy table."""
    return generation % EPOCHS


def coming(epoch: int, number: int = AHEAD) -> list[int]:
    """The epochs that follow an epoch."""
    return [(epoch + step) % EPOCHS for step in range(1, number + 1)]


def stamp(mark: int, verdict: Class, epoch: int) -> int:
    """The mark of a judged packet: everybody else's bits of `mark`, our class and epoch."""
    return (mark & KEEP) | (epoch << EPOCH_SHIFT) | verdict
