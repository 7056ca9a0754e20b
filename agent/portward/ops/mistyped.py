"""Warns of segments in an inventory that are probably mistyped. It is only a warning, because other gateways of
the same store may have interfaces that this host lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from portward.base.interfaces import shown
from portward.config.documents import nearest
from portward.config.keys import Config
from portward.ops import segment_interfaces
from portward.ops.segment_interfaces import in_a_group
from portward.store.protocol import Store

# How many segments are named; the others are counted.
_NAMED: Final = 5


def segments_of(keys: Iterable[str]) -> list[str]:
    """The segments of the attachments among these keys of the store, each once."""
    parts = (key.split("/", 2) for key in keys)
    return list(dict.fromkeys(part[1] for part in parts if part[0] == "attachments" and len(part) > 2))


def here() -> list[str]:
    """The names of all interfaces of this host; empty if they cannot be read."""
    return [device.name for device in segment_interfaces.devices()]


def in_groups(config: Config, store: Store) -> Iterator[str]:
    """A line for each interface of a group that attachments in a store name in the place of the group. Reads the
    attachments of all segments whose names such an interface can have."""
    starts = {f"attachments/{one.removesuffix('*')}" for group in config.groups for one in group.interfaces}
    segments = (segment for start in sorted(starts) for segment in _segments_under(store, start))
    found = [line for segment in dict.fromkeys(segments) if (line := in_a_group(config, segment))]
    for line in found[:_NAMED]:
        yield f"{line}; its attachments do nothing on this gateway"
    if len(found) > _NAMED:
        yield f"and {len(found) - _NAMED} more segments like these"


def _segments_under(store: Store, start: str) -> Iterator[str]:
    """The segments of the attachments whose keys begin with `start`."""
    return (key.split("/", 2)[1] for key, _ in store.under(start))


def warnings(config: Config, segments: Iterable[str], interfaces: Iterable[str]) -> Iterator[str]:
    """A line for each segment that the configuration lacks, or that is not an interface of this host. A host
    without any segment is not a gateway; then only the configuration counts."""
    have = list(dict.fromkeys(one for name in interfaces if (one := config.segment_of(name)) is not None))
    found = [line for segment in segments if (line := _warning(config, segment, have))]
    yield from found[:_NAMED]
    if len(found) > _NAMED:
        yield f"and {len(found) - _NAMED} more segments like these"


def _warning(config: Config, segment: str, have: list[str]) -> str:
    """The line on a segment; empty if there is nothing to say. `have` are the segments with an interface here."""
    if line := in_a_group(config, segment):
        return f"{line}; its attachments do nothing on this gateway"
    if config.group_named(segment) is None and not config.segment(segment):
        return (
            f"segment {shown(segment)}: none of `segments` in the configuration ({config.segments_in_words()}), "
            "so this gateway enforces nothing there"
        )
    if not have or segment in have:
        return ""
    if config.group_named(segment) is not None:
        return f"segment {shown(segment)}: this host has no interface of this group now"
    near = nearest(segment, have)
    hint = f"; {near}" if near.startswith("did you mean") else ""
    return f"segment {shown(segment)}: this host has no such interface now{hint}"
