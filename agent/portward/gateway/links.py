"""The interfaces of a network namespace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple


class Links(NamedTuple):
    """All interfaces of the namespace (index → name), and the indexes that meanwhile were somebody else's.
    `masters` are the interfaces that others are ports of (index of the port → index of its VRF)."""

    names: dict[int, str]
    touched: frozenset[int]
    masters: Mapping[int, int] = MappingProxyType({})


def only_ports(links: Links, segments: Iterable[int]) -> dict[int, int]:
    """The masters that have exactly one of these segments as a port: master → port (indexes). In hook forward a
    queued packet names only the VRF, so with two segments in one VRF it is not known whose it is."""
    ports: dict[int, list[int]] = {}
    for index in segments:
        if index in links.masters:
            ports.setdefault(links.masters[index], []).append(index)
    return {master: found[0] for master, found in ports.items() if len(found) == 1}
