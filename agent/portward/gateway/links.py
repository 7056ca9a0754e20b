"""The interfaces of a network namespace."""

from __future__ import annotations

from typing import NamedTuple


class Links(NamedTuple):
    """All interfaces of the namespace (index → name), and the indexes that meanwhile were somebody else's."""

    names: dict[int, str]
    touched: frozenset[int]
