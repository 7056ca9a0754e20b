"""The interfaces of this host that are behind a segment now: one, or those of an interface group."""

from __future__ import annotations

from collections.abc import Iterable

from portward.base.interfaces import matches, shown
from portward.config.keys import Config
from portward.dataplane import rtnetlink
from portward.dataplane.links import Device


def devices() -> tuple[Device, ...]:
    """The network devices of this host; empty if they cannot be read."""
    try:
        return rtnetlink.devices()
    except OSError:
        return ()


def behind(config: Config, segment: str, found: Iterable[Device] | None = None) -> dict[str, int]:
    """The interfaces of a segment, as records name it: name → index. `found` are the devices of this host, if they
    were read already. Empty for the name of an interface of a group: here no record is about such a segment."""
    if (group := config.group_named(segment)) is not None:
        here = devices() if found is None else found
        return {one.name: one.ifindex for one in here if matches(group.interfaces, one.name)}
    if config.group_of(segment) is not None:
        return {}
    index = rtnetlink.index_of(segment)
    return {} if index is None else {segment: index}


def in_a_group(config: Config, segment: str) -> str:
    """The sentence about a record whose segment is an interface of a group here; empty if it is none."""
    group = config.group_of(segment)
    if group is None or config.group_named(segment) is not None:
        return ""
    return f"segment {shown(segment)}: this interface belongs to group {shown(group.name)} here, so name the group"
