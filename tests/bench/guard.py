"""The cost of the forward guard while it is loaded, and the time from the first foreign translation to its
load."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Final

from bench import lanes
from bench.fast_path import SOURCES, portward, sources
from bench.figures import Figure
from bench.lanes import Lane, ratio
from kernel.conftest import ALLOWED, DENIED
from portward.dataplane.names import GUARD_HOOKS, TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.lab import namespaces
from portward.lab.agent import until

# A rule in a chain without a hook: it makes the agent load the guard, and no packet passes it.
_REWRITE: Final = "table inet other { chain c { tcp dport set 25; }; }\n"
_NAT: Final = "table ip other { chain c { type nat hook prerouting priority dstnat; }; }\n"
_ROUNDS: Final = 200
_LOADS: Final = 40


def measure(folder: Path) -> list[Figure]:
    """The ratios `guarded_…_vs_not` and the milliseconds of `guard_loaded_after`."""
    for name in ("plain", "guarded"):
        (folder / name).mkdir()
    with portward(folder / "plain") as plain, portward(folder / "guarded") as guarded:
        figures = [_loaded_after(guarded)]
        namespaces.load(guarded.gateway, _REWRITE)
        with namespaces.inside(guarded.gateway):
            netlink = NfNetlink()
        with closing(netlink):
            until(lambda: GUARD_HOOKS.keys() <= netlink.hooks(TABLE).keys(), "the guard is loaded")
        for what, offer, port in (("deny", DENIED, 25), ("allow", ALLOWED, 25), ("bystander", ALLOWED, 443)):
            for family in (4, 6):
                packets = lanes.frames(folder / "frames", sources(offer, SOURCES, family), port, family=family)
                rates = lanes.race(folder, {"plain": plain, "guarded": guarded}, packets, rounds=_ROUNDS)
                suffix = "" if family == 4 else "_ipv6"
                figures.append(ratio(f"guarded_{what}_vs_not{suffix}", rates, "guarded", "plain"))
        return figures


def _loaded_after(lane: Lane) -> Figure:
    """Milliseconds from the commit of another program's first translation to the commit of the guard."""
    found = []
    with namespaces.inside(lane.gateway), closing(NfNetlink()) as netlink:
        nft = Nft()
        for _ in range(_LOADS):
            nft.load(_NAT)
            loaded = time.perf_counter()
            while not GUARD_HOOKS.keys() <= netlink.hooks(TABLE).keys():
                if time.perf_counter() > loaded + 5:
                    raise TimeoutError("the guard was not loaded within 5 s")
                time.sleep(0.0005)  # pause: of a poll
            found.append((time.perf_counter() - loaded) * 1000)
            nft.load("delete table ip other\n")
            until(lambda: not GUARD_HOOKS.keys() & netlink.hooks(TABLE).keys(), "the guard is gone")
    return Figure("guard_loaded_after", statistics.median(found), min(found), max(found), "ms")
