"""The names in portward's two tables of the kernel: sets, maps, base chains, and what each set counts. Pure.

The definitions are in `rules/nftables/portward.nft`. A set that is keyed by address exists twice, for each family:
its name here lacks the digit 4 or 6. Metrics show the names of counters and verdicts, so those never change.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, TypeAlias

from portward.dataplane.nf_tables import NFPROTO_BRIDGE, NFPROTO_INET
from portward.ipc import mark


class LimitResult(Enum):
    """Packets of a source whose exemption carries a rate limit: those within it, and new connections over it."""

    WITHIN = auto()
    OVER = auto()


class NoVerdict(Enum):
    """Packets of a segment to a policy port for which no verdict was found, or none came back."""

    DROPPED = auto()
    PASSED = auto()


# The packets that an element of a set counts.
Verdict: TypeAlias = mark.Class | LimitResult | NoVerdict

TABLE: Final = "portward"  # the name of both tables
CLOSED: Final = f"{TABLE}_closed"  # the name of the tables of closed.nft and closed-bridge.nft


class KernelTable(Enum):
    """portward's tables in the kernel. INET sees what this host routes, BRIDGE each frame that a bridge of this
    host takes from a port. Both have the same sets and chains, except those that only routed packets need. The
    values are the kernel's numbers of their families."""

    INET = NFPROTO_INET
    BRIDGE = NFPROTO_BRIDGE

    @property
    def family(self) -> str:
        """The family in nft's language."""
        return self.name.lower()

    def __str__(self) -> str:
        return f"{self.family} {TABLE}"

    @property
    def closed(self) -> str:
        """The table of this family that stands in for it if the configuration cannot be read."""
        return f"{self.family} {CLOSED}"

    def qualified(self, set_: str) -> str:
        """A name for a set of this table that no set of the other table has. For INET it is the set's own name,
        because files of older agents have those."""
        return set_ if self is KernelTable.INET else f"{self.family} {set_}"


def unqualified(name: str) -> tuple[KernelTable, str]:
    """The table and the set with this qualified name."""
    family, space, set_ = name.rpartition(" ")
    return (KernelTable[family.upper()], set_) if space else (KernelTable.INET, name)


# --- sets that a load fills ---

# Nothing changes their elements until the next load.
FIXED_SETS: Final = (
    "definitions", "observed_segments", "open_segments",
    "internal4", "internal6", "octets4", "octets6",
)  # fmt: skip
# Sets of older rulesets, which a load deletes.
RETIRED_SETS: Final = ("segments",)

# --- sets that packets fill: the cached verdicts ---

VERDICT_SETS: Final[dict[mark.Class, str]] = {
    mark.Class.ALLOW: "allow",
    mark.Class.DENY: "deny",
    mark.Class.OBSERVED: "observed",
    mark.Class.REFUSED: "refused",
    mark.Class.UNKNOWN: "unknown",
}
# Packets of sources with a rate limit.
LIMITED_SETS: Final = {LimitResult.WITHIN: "rated", LimitResult.OVER: "throttled"}
COUNTED_SETS: Final[dict[Verdict, str]] = dict([*VERDICT_SETS.items(), *LIMITED_SETS.items()])
# Packets that were handled by a verdict that is not cached, by source and mark; when this set is full, by segment
# and mark.
UNCACHED: Final = "uncached"
UNCACHED_SEGMENTS: Final = "uncached_segments"
# Packets that are counted by segment alone, because they have no subscription or no verdict.
SEGMENT_SETS: Final[dict[Verdict, str]] = {
    mark.Class.UNKNOWN: "unknown_segments",
    NoVerdict.DROPPED: "unjudged_drops",
    NoVerdict.PASSED: "unjudged_passes",
}
# Packets over the miss limit of a segment, by segment. They are also in SEGMENT_SETS.
MISS_LIMITED_SEGMENTS: Final = "limited_segments"
# The token buckets of segments and sources.
BUCKET_SETS: Final = (
    "miss_rate", "committed_rate", "share", "reset_rate4", "reset_rate6", "reset_segments",
)  # fmt: skip

# All sets whose elements count packets that no other set counts. UNKNOWN sources are counted by segment.
COUNTING_SETS: Final = frozenset(
    {f"{name}{family}" for name in (*COUNTED_SETS.values(), UNCACHED) for family in "46"}
    | {UNCACHED_SEGMENTS, *SEGMENT_SETS.values()}
) - {f"{VERDICT_SETS[mark.Class.UNKNOWN]}{family}" for family in "46"}

# --- sets and maps that the agent fills ---

# Maps: source with a rate limit → name of the limit.
RATE_LIMITS: Final = "rates"
# The epoch under which verdicts are cached, and the epochs before and after it whose verdicts may still arrive.
EPOCH: Final = "epoch"
RECENT_EPOCHS: Final = "recent"
COMING_EPOCHS: Final = "coming"
# The generation of the policy table that all cached verdicts agree with.
SYNCED: Final = "synced"
# Interfaces whose index belonged to another interface before, while the policy table has not noticed: all that
# they send to a policy port is dropped.
UNSETTLED: Final = "unsettled"
# Interfaces that are neither segments nor uplinks, and from which packets to policy ports pass, because the agent
# has classified them.
KNOWN_INTERFACES: Final = "known_interfaces"
# Interfaces whose owner has changed in the last ten seconds: verdicts that were found before do not count.
RENEWED: Final = "renewed"
# Interfaces behind the gate, and the generation that the gate enforces (module `gate`).
GATED: Final = "gated"
ENFORCED: Final = "enforced"

NO_INTERFACE: Final = "no interface"  # a pattern that matches nothing: the kernel allows no space in a name

# --- base chains: name → hook (NF_INET_PRE_ROUTING 0, NF_INET_LOCAL_IN 1, NF_INET_FORWARD 2) and priority ---

# Before connection tracking (-200) and before chains at priority `raw` (-300), whose rules could take a packet
# past the queue.
_FIRST: Final = -302
# The last priority that there is, so that the rewrites of others come before.
_LAST: Final = 2**31 - 1
# The kernel puts a new chain before the chains of equal priority. Registered in this order, they are met in the
# opposite one: a packet meets `screen` first, and no chain of another program can be between the two.
HOOKS: Final = {"learn": (0, _FIRST), "screen": (0, _FIRST)}
TUNNELS_HOOKS: Final = {"tunnels": (1, _FIRST)}
# Loaded only if `Surroundings.guard`; in this order for the same reason.
GUARD_HOOKS: Final = {"settled": (2, _LAST), "guard": (2, _LAST)}
# Loaded only if `Surroundings.stacked`.
STACKED_HOOKS: Final = {"stacked": (2, _FIRST)}
