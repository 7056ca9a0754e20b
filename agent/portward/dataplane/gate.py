"""The gate: cached verdicts of some interfaces stop letting packets pass at once. Pure, over `Elements`.

The search of large sets takes some 100 ms. The gate takes one small transaction, and the search follows it. The
gate is a rule at the head of the ruleset. It sends the packets of the interfaces in the set `gated` to a worker,
past the cached verdicts that let packets pass. The rule exists only during the search, so that at other times no
packet pays for it.

The gate is removed in the transaction that records that all cached verdicts agree with the table, or by a reload
of the ruleset, before which every cached verdict that lets packets pass is forgotten. If the process dies before
that, the gate stays until the next start loads the ruleset. Until then packets of these interfaces ask a worker,
and are dropped if no worker answers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from errno import EEXIST
from typing import Final

from portward.dataplane.elements import Add, Change, DeleteRule, Elements, Flush, InsertRule, RefusedError
from portward.dataplane.names import ENFORCED, GATED

# From this many elements on the search takes 50 ms or more, and the two transactions of the gate are worth it.
MIN_GATED_ELEMENTS: Final = 8_192

_HEAD_CHAIN: Final = "screen"  # the chain that every packet meets first
_GATE_CHAIN: Final = "gate"
_NUMBER: Final = struct.Struct("=I")


class Gate:
    """The gate of the table in this network namespace."""

    def __init__(self, elements: Elements) -> None:
        self._elements = elements

    def shut(self, links: Iterable[int], enforced: int | None, first: Sequence[Change] = ()) -> None:
        """Shuts the gate for the interfaces with these indexes, and makes the changes `first` in the same
        transaction. `enforced` is the generation of the policy table that is in force from then on; None if the
        cache may also hold verdicts that wrongly stop packets. Raises OSError and RefusedError, also if a gate is
        shut already: then the last change has failed, and only a reload that forgets everything may remove it."""
        if self._rules():
            raise RefusedError(EEXIST, "a gate is shut already")
        keys = [_NUMBER.pack(link) for link in sorted(links)]
        enforces: list[Change] = [] if enforced is None else [Add(ENFORCED, [_NUMBER.pack(enforced)])]
        rule = InsertRule(_HEAD_CHAIN, GATED, _GATE_CHAIN)
        self._elements.commit([*first, Flush(GATED), Flush(ENFORCED), Add(GATED, keys), rule, *enforces])

    def lifted(self) -> list[Change]:
        """The changes that remove the gate, for the caller's transaction. Raises OSError."""
        return [*(DeleteRule(_HEAD_CHAIN, handle) for handle in self._rules()), Flush(GATED), Flush(ENFORCED)]

    def _rules(self) -> list[int]:
        return self._elements.rules_on(_HEAD_CHAIN, GATED)
