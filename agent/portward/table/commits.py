"""The result of a transaction on the policy table, and the values that its caller gives. Does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from portward.model import Network

# If more prefixes than this change, it is cheaper to clear the kernel's verdict cache than to delete each of them
# from it.
MANY_CHANGES: Final = 20_000


class ChangedPlace(NamedTuple):
    """A prefix in a segment whose verdict has changed."""

    segment: str
    network: Network


class Committed(NamedTuple):
    """The changes of a transaction: prefixes, interface indexes, or everything.

    `revision` and `generation` are the table's now; the generation is new if any verdict is new. If `opens` is
    False, every prefix in `changed` is denied now, so cached verdicts that deny are still right. If `closes` is
    False, every prefix in `changed` was denied before, so no cached verdict allows. `steps` is the number of
    generations that it covers: more than one if changes were `merged`.
    """

    revision: int
    generation: int
    changed: tuple[ChangedPlace, ...] = ()
    links: frozenset[int] = frozenset()
    everything: bool = False
    opens: bool = True
    closes: bool = True
    steps: int = 1

    @property
    def new(self) -> bool:
        """True if any cached verdict may be wrong now."""
        return bool(self.changed or self.links or self.everything)


def merged(commits: Sequence[Committed]) -> Committed:
    """One change that covers commits that follow each other; at least one."""
    new = [one for one in commits if one.new]
    changed = tuple(dict.fromkeys(place for one in new for place in one.changed))
    everything = any(one.everything for one in new) or len(changed) > MANY_CHANGES
    return Committed(
        commits[-1].revision,
        commits[-1].generation,
        () if everything else changed,
        frozenset().union(*(one.links for one in new)),
        everything,
        opens=any(one.opens for one in new),
        closes=any(one.closes for one in new),
        steps=sum(one.steps for one in new),
    )


class Answers(NamedTuple):
    """How this gateway acts on denials: `observe` only counts them, `reject` answers them with a TCP reset."""

    observe: bool
    reject: bool


class Point(NamedTuple):
    """A revision of a store's log and its hash (32 bytes)."""

    revision: int
    hash: bytes
