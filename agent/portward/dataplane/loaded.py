"""Reads from the kernel how the loaded ruleset treats segments. The configuration may differ, because it can be
edited while no agent runs.
"""

from __future__ import annotations

import sys
from typing import Final

from portward.base.interfaces import decoded, encoded
from portward.dataplane.names import KNOWN_INTERFACES, NO_INTERFACE, TABLE
from portward.dataplane.nfnetlink import NfNetlink

# The sets of segments whose sources pass while no worker answers, and of those that are only observed.
OPEN: Final = "open_segments"
OBSERVED: Final = "observed_segments"
# The chain that sees each packet first, and a set that a rule of it looks up.
_SCREEN, _DENIED = "screen", "deny4"
# IFNAMSIZ: the kernel pads a name with zeros.
_NAME_BYTES: Final = 16


def has_rules(netlink: NfNetlink) -> bool:
    """Whether the rules that screen packets are in the table. If another program runs `nft flush table`, chains
    and sets stay, and everything passes until an agent repairs it. Raises OSError."""
    try:
        return bool(netlink.rules_on(TABLE, _SCREEN, _DENIED))
    except FileNotFoundError:  # the chain is gone as well
        return False


def holds(netlink: NfNetlink, set_: str, segment: str) -> bool:
    """Whether a pattern in this set matches a segment; False if there is no such set. Raises OSError."""
    return netlink.element(TABLE, set_, encoded(segment).ljust(_NAME_BYTES, b"\0")) is not None


def passed_by(netlink: NfNetlink, index: int) -> bool:
    """Whether the interface with this index is a known interface, so that its packets pass without a verdict.
    Raises OSError."""
    return netlink.element(TABLE, KNOWN_INTERFACES, index.to_bytes(4, sys.byteorder)) is not None


def patterns(netlink: NfNetlink, set_: str) -> tuple[str, ...]:
    """The patterns in a set, in the form of the configuration; none if there is no such set. Raises OSError."""
    try:
        keys = sorted(element.key for element in netlink.elements(TABLE, set_))
    except FileNotFoundError:
        return ()
    # The kernel stores each pattern as an interval: its first name, and the first name after it. Before all of
    # them it stores one end without a name.
    bounds = [key for key in keys if key.strip(b"\0")]
    found = [_pattern(first, behind) for first, behind in zip(bounds[::2], bounds[1::2], strict=False)]
    return tuple(pattern for pattern in found if pattern != NO_INTERFACE)


def _pattern(first: bytes, behind: bytes) -> str:
    name = decoded(first.rstrip(b"\0"))
    return name if int.from_bytes(behind, "big") - int.from_bytes(first, "big") == 1 else f"{name}*"
