"""Checks a source as an operator gives it to `explain` and `diagnose`: a segment, and an address in it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from portward.base.addresses import is_address, parse_address
from portward.base.interfaces import is_name
from portward.config.documents import brief
from portward.config.keys import Config
from portward.dataplane.rtnetlink import index_of
from portward.errors import InputError
from portward.model import Address

_SEGMENT: Final = "SEGMENT"


def source(config: Config, path: Path, segment: str, address: str) -> Address:
    """The source address. Raises InputError for an invalid address, and for a segment that the configuration at
    `path` lacks, or that cannot be the name of an interface."""
    if is_address(segment) and config.segment(address):
        raise InputError(f"{brief(segment)} is an address: the segment comes before it", field=_SEGMENT)
    found = parse_address(address, "ADDRESS")
    if not config.segment(segment):
        raise InputError(
            f"{brief(segment)} is not a segment of {path}: {', '.join(config.segments)}", field=_SEGMENT
        )
    # An interface may have a name with an asterisk. Then it is a segment like any other.
    if "*" in segment and index_of(segment) is None:
        raise InputError(f"{brief(segment)} is a pattern: name one segment, such as vni1002", field=_SEGMENT)
    if not is_name(segment):
        raise InputError(
            f"{brief(segment)} is no interface name: up to 15 bytes without space, '/', ':' or '%'", field=_SEGMENT
        )
    return found


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
