"""The cached verdicts that a change of the policy table reaches. Pure.

The table names a source by its segment, the kernel by its interface. An address of an interface group may be
cached behind each interface of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from portward.dataplane.desired import SegmentLinks
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.verdict_cache import Source
from portward.table.commits import ChangedPlace, Committed

# Up to this many sources, the changed addresses of groups are written out for each interface. If there are more,
# they are prefixes, whose search takes as long in a group of any size.
_WRITTEN_OUT: Final = 4_096


class Reach(NamedTuple):
    """The changed addresses of segments with one interface, and of groups, there behind each interface; and all
    other changed prefixes, with the interfaces that changed."""

    single: list[Source]
    grouped: list[Source]
    prefixes: Prefixes


def reach(links: SegmentLinks, change: Committed) -> Reach:
    """The sources and prefixes that a change reaches. `links` are the interfaces of the segments."""
    found = Reach([], [], Prefixes())
    for link in change.links:
        found.prefixes.add_link(link)
    in_groups = sum(len(behind) for behind, _ in _places(links, change) if len(behind) > 1)
    for behind, place in _places(links, change):
        if len(behind) == 1 and _is_address(place):
            found.single.append(_source(behind[0], place))
        elif in_groups <= _WRITTEN_OUT and _is_address(place):
            found.grouped.extend(_source(index, place) for index in behind)
        else:
            found.prefixes.add(behind, place.network)
    return found


def _places(links: SegmentLinks, change: Committed) -> Iterator[tuple[tuple[int, ...], ChangedPlace]]:
    """The changed places of segments that have an interface here, with these interfaces."""
    for place in change.changed:
        if behind := links.get(place.segment):
            yield behind, place


def _is_address(place: ChangedPlace) -> bool:
    return place.network.prefixlen == place.network.max_prefixlen


def _source(index: int, place: ChangedPlace) -> Source:
    return Source(index, place.network.network_address.packed)
