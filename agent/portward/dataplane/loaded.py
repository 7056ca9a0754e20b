"""What the ruleset that is loaded does with segments, as the kernel says. The configuration says it of the next
one: a file can be edited while no agent runs to take it in."""

from __future__ import annotations

import sys
from typing import Final

from portward.base.interfaces import decoded, encoded
from portward.dataplane.names import KNOWN_INTERFACES, NO_INTERFACE, TABLE
from portward.dataplane.nfnetlink import NfNetlink

# Segments whose sources pass while no worker answers; and those of them that are only observed.
OPEN: Final = "open_segments"
OBSERVED: Final = "observed_segments"
# The chain that sees each packet first, and a set that a rule of it looks up.
_SCREEN, _DENIED = "screen", "deny4"
# The kernel keeps a name in so many bytes, filled up with zeros.
_NAME_BYTES: Final = 16


def has_rules(netlink: NfNetlink) -> bool:
    """Whether the rules that screen packets are in the table: `nft flush table`, by another program, leaves the
    chains and the sets, and everything passes until an agent repairs it. Raises OSError."""
    try:
        return bool(netlink.rules_on(TABLE, _SCREEN, _DENIED))
    except FileNotFoundError:  # the chain is gone, too
        return False


def holds(netlink: NfNetlink, set_: str, segment: str) -> bool:
    """Whether a set of patterns covers a segment; False if there is no such set. Raises OSError."""
    return netlink.element(TABLE, set_, encoded(segment).ljust(_NAME_BYTES, b"\0")) is not None


def passed_by(netlink: NfNetlink, index: int) -> bool:
    """Whether the agent has written an interface, by its index, among those that are no segments, of which nothing
    is judged. Raises OSError."""
    return netlink.element(TABLE, KNOWN_INTERFACES, index.to_bytes(4, sys.byteorder)) is not None


def patterns(netlink: NfNetlink, set_: str) -> tuple[str, ...]:
    """The patterns in a set, as a configuration writes them; none if there is no such set. Raises OSError."""
    try:
        keys = sorted(element.key for element in netlink.elements(TABLE, set_))
    except FileNotFoundError:
        return ()
    # Each pattern is an interval: its first name, and the first name behind it. The kernel keeps an end of nothing
    # before them all.
    bounds = [key for key in keys if key.strip(b"\0")]
    found = [_pattern(first, behind) for first, behind in zip(bounds[::2], bounds[1::2], strict=False)]
    return tuple(pattern for pattern in found if pattern != NO_INTERFACE)


def _pattern(first: bytes, behind: bytes) -> str:
    name = decoded(first.rstrip(b"\0"))
    return name if int.from_bytes(behind, "big") - int.from_bytes(first, "big") == 1 else f"{name}*"
