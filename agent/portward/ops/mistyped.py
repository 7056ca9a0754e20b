"""Segments that an inventory names and that are likely mistyped: a warning, since other gateways of the same store
may have interfaces that this host has not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from portward.base.interfaces import shown
from portward.config.documents import nearest
from portward.config.keys import Config
from portward.dataplane import rtnetlink

# How many segments are named.
_NAMED: Final = 5


def segments_of(keys: Iterable[str]) -> list[str]:
    """The segments of the attachments among these keys of the store, each once."""
    parts = (key.split("/", 2) for key in keys)
    return list(dict.fromkeys(part[1] for part in parts if part[0] == "attachments" and len(part) > 2))


def here() -> list[str]:
    """The names of all interfaces of this host; none if it does not say."""
    try:
        return [device.name for device in rtnetlink.devices()]
    except OSError:
        return []


def warnings(config: Config, segments: Iterable[str], interfaces: Iterable[str]) -> Iterator[str]:
    """A line for each segment that is none of the configuration, or no interface of this host. A host without any
    segment is no gateway, and then only the configuration is asked."""
    have = [name for name in interfaces if config.segment(name)]
    found = [line for segment in segments if (line := _warning(config, segment, have))]
    yield from found[:_NAMED]
    if len(found) > _NAMED:
        yield f"and {len(found) - _NAMED} more segments like these"


def _warning(config: Config, segment: str, have: list[str]) -> str:
    if not config.segment(segment):
        return (
            f"segment {shown(segment)}: none of `segments` in the configuration ({', '.join(config.segments)}), "
            "so this gateway judges nothing there"
        )
    if not have or segment in have:
        return ""
    near = nearest(segment, have)
    hint = f"; {near}" if near.startswith("did you mean") else ""
    return f"segment {shown(segment)}: this host has no such interface now{hint}"
