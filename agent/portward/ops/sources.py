"""Checks a source as an operator gives it to `explain` and `diagnose`: a segment, and an address in it."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from portward.base.addresses import is_address, parse_address
from portward.base.interfaces import is_name, shown
from portward.config.documents import brief
from portward.config.keys import Config
from portward.dataplane.rtnetlink import index_of
from portward.errors import InputError
from portward.model import Address
from portward.ops.segment_interfaces import in_a_group

_SEGMENT: Final = "SEGMENT"


class Named(NamedTuple):
    """A source as an operator has named it. `segment` is as records name it. `interface` is the interface of a
    group that the operator named instead; empty if it was the segment."""

    segment: str
    address: Address
    interface: str = ""

    def remark(self) -> str:
        """The sentence about the interface; empty if the operator named the segment."""
        if not self.interface:
            return ""
        return (
            f"{shown(self.interface)} belongs to group {shown(self.segment)}: the policy names the group, and "
            "this is what it says"
        )


def source(config: Config, path: Path, segment: str, address: str) -> Named:
    """The source. Raises InputError for an invalid address, and for a segment that the configuration at `path`
    lacks, or that cannot be the name of an interface."""
    if is_address(segment) and (config.segment(address) or config.group_named(address)):
        raise InputError(f"{brief(segment)} is an address: the segment comes before it", field=_SEGMENT)
    found = parse_address(address, "ADDRESS")
    if config.group_named(segment) is not None:
        return Named(segment, found)
    if not config.segment(segment):
        raise InputError(
            f"{brief(segment)} is not a segment of {path}: {config.segments_in_words()}", field=_SEGMENT
        )
    # An interface may have a name with an asterisk. Then it is a segment like any other.
    if "*" in segment and index_of(segment) is None:
        raise InputError(f"{brief(segment)} is a pattern: name one segment, such as vni1002", field=_SEGMENT)
    if not is_name(segment):
        raise InputError(
            f"{brief(segment)} is no interface name: up to 15 bytes without space, '/', ':' or '%'", field=_SEGMENT
        )
    group = config.group_of(segment)
    return Named(segment, found) if group is None else Named(group.name, found, segment)


def require_segment(config: Config, segment: str) -> None:
    """Raises InputError for an interface of a group, because records name the group."""
    if line := in_a_group(config, segment):
        raise InputError(line, field=_SEGMENT)


def destination(text: str, of: Address) -> Address:
    """The destination of packets of a source. Raises InputError for an invalid address, and for one of the other
    address family, because no packet has both."""
    found = parse_address(text, "--to")
    if found.version != of.version:
        raise InputError(
            f"{found} is an IPv{found.version} address, and the source {of} is an IPv{of.version} address: no "
            f"packet has both, an IPv{of.version} address would be right",
            field="--to",
        )
    return found
