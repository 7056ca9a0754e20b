"""Reads the shipped ruleset files."""

from __future__ import annotations

from portward.base import resources
from portward.dataplane.ruleset import Templates


def read() -> Templates:
    """The shipped texts. Each file is read once per process, because a ruleset must be put back also when no
    descriptor is left."""
    names = ("portward.nft", "stacked.nft", "bridge.nft")
    return Templates(*(resources.text("nftables", name) for name in names))
