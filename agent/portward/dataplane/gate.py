"""The gate: cached verdicts of some interfaces stop letting packets pass at once, whatever the cache holds.

To search large sets takes some 100 ms. The gate takes one small transaction, and the search follows it: a rule at
the head of the ruleset leads packets of the interfaces in the set `gated` past the cached verdicts that let
packets pass, to a worker. The rule stands there only during the search, so that at other times no packet pays for
it.

The gate is removed in the transaction that says that everything cached agrees with the table again, or by a
reload of the ruleset, before which every cached verdict that lets packets pass is forgotten. If the process dies
before, the gate stays until the next start loads the ruleset; until then packets from these interfaces are asked
about, and dropped if no worker answers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from errno import EEXIST
from typing import Final

from portward.dataplane.elements import Add, Change, DeleteRule, Elements, Flush, InsertRule, RefusedError
from portward.dataplane.ruleset import ENFORCED, GATED

# From this many elements on to be searched the gate pays: two more transactions, against 50 ms and more.
WORTH_A_GATE: Final = 8_192

_HEAD: Final = "screen"  # the chain that every packet meets first
_GATE: Final = "gate"
_NUMBER: Final = struct.Struct("=I")


class Gate:
    """The gate of the table in this network namespace."""

    def __init__(self, elements: Elements) -> None:
        self._elements = elements

    def shut(self, links: Iterable[int], enforced: int | None, first: Sequence[Change] = ()) -> None:
        """Puts the gate before the interfaces with these indexes, and makes the changes `first` in the same
        transaction. `enforced`: the generation of the policy table that is in force with it, or None if the cache
        may also hold verdicts that wrongly stop packets. Raises OSError, and RefusedError also if there is a gate:
        the change before has failed, and only a reload that forgets everything may remove it."""
        if self._rules():
            raise RefusedError(EEXIST)
        keys = [_NUMBER.pack(link) for link in sorted(links)]
        says: list[Change] = [] if enforced is None else [Add(ENFORCED, [_NUMBER.pack(enforced)])]
        rule = InsertRule(_HEAD, GATED, _GATE)
        self._elements.commit([*first, Flush(GATED), Flush(ENFORCED), Add(GATED, keys), rule, *says])

    def lifted(self) -> list[Change]:
        """What removes the gate, to be done in the caller's transaction. Raises OSError."""
        return [*(DeleteRule(_HEAD, handle) for handle in self._rules()), Flush(GATED), Flush(ENFORCED)]

    def _rules(self) -> list[int]:
        return self._elements.rules_on(_HEAD, GATED)
