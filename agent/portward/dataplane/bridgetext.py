"""The ruleset as the table `bridge portward`: the text for the table `inet`, with what differs exchanged. Pure.

Both tables have the same rules, so they have the same text. The family bridge has no word for some of it: a
priority is a number, and the IP version is that of the frame's protocol. Never `ether type`: behind a VLAN tag it
is not what the rules are about.
"""

from __future__ import annotations

import re
from typing import Final

from portward.dataplane.names import KernelTable

# Texts that are exchanged, and in how many places. First the words of the family; then, if frames without an IP
# packet are dropped, the way of IPv6 packets whose header chain may be cut off.
_WORDS: Final = (
    (r"\binet portward\b", str(KernelTable.BRIDGE), range(1, 10_000)),
    (r"priority raw - 2;", "priority -302;", range(3, 4)),
    (r"meta nfproto (!= )?ipv6\b", r"meta protocol \g<1>ip6", range(4, 5)),
)
_CUT_OFF: Final = (
    r"exthdr frag missing accept(?=\n    frag frag-off != 0 accept\n    tcp dport)",
    "exthdr frag missing goto unfragmented6",
    range(1, 3),  # the second one is in a part that is left out if all segments are only observed
)
# nft wants a chain to be there when a rule names it, and bridge.nft, which fills this one, stands behind that
# rule.
_CHAIN: Final = f"table {KernelTable.BRIDGE} {{\n  chain unfragmented6 {{\n  }}\n}}\n"


def for_bridge(text: str, *, unknown_frames_pass: bool) -> str:
    """The text for the table `bridge`. With `unknown_frames_pass` it lacks bridge.nft. Raises ValueError if the
    text has another number of places for something that must be exchanged."""
    for pattern, value, places in (*_WORDS, *(() if unknown_frames_pass else (_CUT_OFF,))):
        text, count = re.subn(pattern, value, text)
        if count not in places:
            raise ValueError(f"the ruleset has {count} places for {pattern}")
    return text if unknown_frames_pass else _CHAIN + text
