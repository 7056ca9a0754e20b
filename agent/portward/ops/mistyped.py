"""Warns of segments in an inventory that are probably mistyped. It is only a warning, because other gateways of
the same store may have interfaces that this host lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from portward.base.interfaces import shown
from portward.config.documents import nearest
from portward.config.keys import Config
from portward.dataplane import rtnetlink

# How many segments are named; the others are counted.
_NAMED: Final = 5


def segments_of(keys: Iterable[str]) -> list[str]:
    """The segments of the attachments among these keys of the store, each once."""
    parts = (key.split("/", 2) for key in keys)
    return list(dict.fromkeys(part[1] for part in parts if part[0] == "attachments" and len(part) > 2))


def here() -> list[str]:
    """The names of all interfaces of this host; empty if they cannot be read."""
    try:
        return [device.name for device in rtnetlink.devices()]
    except OSError:
        return []


def warnings(config: Config, segments: Iterable[str], interfaces: Iterable[str]) -> Iterator[str]:
    """A line for each segment that the configuration lacks, or that is not an interface of this host. A host
    without any segment is not a gateway; then only the configuration counts."""
    have = [name for name in interfaces if config.segment(name)]
    found = [line for segment in segments if (line := _warning(config, segment, have))]
    yield from found[:_NAMED]
    if len(found) > _NAMED:
        yield f"and {len(found) - _NAMED} more segments like these"


def _warning(config: Config, segment: str, have: list[str]) -> str:
    if not config.segment(segment):
        return (
            f"segment {shown(segment)}: none of `segments` in the configuration ({', '.join(config.segments)}), "
            "so this gateway enforces nothing there"
        )
    if not have or segment in have:
        return ""
    near = nearest(segment, have)
    hint = f"; {near}" if near.startswith("did you mean") else ""
    return f"segment {shown(segment)}: this host has no such interface now{hint}"
