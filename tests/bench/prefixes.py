"""How long it takes until no old verdict acts any more, if prefixes are revoked while many verdicts are cached.

The real KernelSync writes to the real ruleset in a network namespace of its own. The elements are added as packets
would have added them. The sizes of the sets are read before, as the daemon has them from counting. Two times of
each `KernelSync.apply` are measured. `enforced` ends with the transaction after which no old verdict acts any
more: that of the gate or, without one, the one that writes `synced`. `synced` ends with the transaction that
writes `synced`, when no old allow is cached any more. After each change the sets are read, and no element may be
left in the revoked prefixes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Network
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from bench.figures import Figure, percentile
from kernel.conftest import lab_name
from portward.config.keys import Config, Verdicts
from portward.dataplane import xtables
from portward.dataplane.desired import Desired
from portward.dataplane.elements import Add, Change, Flush
from portward.dataplane.monitor import RulesetMonitor
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.sync import KernelSync
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.lab import namespaces
from portward.policy import presets
from portward.table.commits import ChangedPlace, Committed

_FIRST_LINK: Final = 2
_FIRST6: Final = int(IPv6Network("2001:db8::/32").network_address)
_FIRST4: Final = 10 << 24
_ROUNDS: Final = 20


class Case(NamedTuple):
    """`cached` verdicts, spread evenly over `sets`, over `links` interfaces, and over `prefixes` /64s behind each
    interface. `revoked` /64s in total are revoked or, with `opens`, granted."""

    name: str
    cached: int
    sets: tuple[str, ...]
    links: int
    prefixes: int
    revoked: int
    goal: str = ""
    opens: bool = False

    def keys(self, set_: str) -> list[bytes]:
        """The keys that are cached in a set."""
        return [self._key(number, set_[-1]) for number in range(self.cached // len(self.sets))]

    def _key(self, number: int, family: str) -> bytes:
        link, place = _FIRST_LINK + number % self.links, number // self.links
        if family == "4":
            return Source(link, (_FIRST4 + place).to_bytes(4, "big")).key
        address = self._prefix(link, place % self.prefixes) + place
        return Source(link, address.to_bytes(16, "big")).key

    def _prefix(self, link: int, number: int) -> int:
        return _FIRST6 + (link << 80) + (number << 64)

    def changed(self) -> tuple[ChangedPlace, ...]:
        """The /64s that are revoked: one by one behind each interface in turn."""
        links = range(_FIRST_LINK, _FIRST_LINK + self.links)
        places = ((link, number) for number in range(self.prefixes) for link in links)
        return tuple(
            ChangedPlace(f"vni{link}", IPv6Network((self._prefix(link, number), 64)))
            for link, number in islice(places, self.revoked)
        )


_EVEN: Final = ("allow4", "deny4", "allow6", "deny6")
CASES: Final = (
    Case("1000_segments", 100_000, _EVEN, links=1_000, prefixes=5, revoked=1_000, goal="<= 100"),
    Case("1000_segments_one_set", 100_000, ("allow6",), links=1_000, prefixes=20, revoked=1_000, goal="<= 100"),
    Case("one_segment", 16_384, ("allow6",), links=1, prefixes=10_000, revoked=5_000, goal="<= 150"),
    Case("granted", 100_000, _EVEN, links=1_000, prefixes=5, revoked=1_000, opens=True),
    Case("one_prefix", 100_000, _EVEN, links=1_000, prefixes=5, revoked=1),
)


class Timed(KernelElements):
    """The kernel's elements, with times of the monotonic clock: `synced_at`, when `synced` was last written, and
    `enforced_at`, when that or `enforced` was first written since it was set to 0."""

    synced_at = enforced_at = 0.0

    def commit(self, changes: Iterable[Change]) -> None:
        """See `Elements`."""
        changes = list(changes)
        super().commit(changes)
        now = time.monotonic()
        synced = Flush("synced") in changes
        if synced:
            self.synced_at = now
        if synced or any(isinstance(change, Add) and change.set == "enforced" for change in changes):
            self.enforced_at = self.enforced_at or now


class Gateway:
    """Ruleset, sets and KernelSync in the calling thread's network namespace; vniN is the interface N."""

    def __init__(self, links: int) -> None:
        self._netlink = NfNetlink()
        nft = Nft(self._netlink, compiles=False)
        self.kernel = Timed(self._netlink)
        self._cache = VerdictCache(self.kernel)
        preset, native = presets.load("azure-2020"), xtables.has_native_queue(nft)
        config = Config(
            segments=("vni*",), uplinks=("up0",), verdicts=Verdicts(allow_seconds=600, deny_seconds=600)
        )

        self.sync = KernelSync(
            RulesetReconciler(nft, self._netlink, self._cache), self._cache, RateLimits(self.kernel),
            lambda sources: None, native=native,
        )  # fmt: skip
        self._links = {f"vni{link}": (link,) for link in range(_FIRST_LINK, _FIRST_LINK + links)}
        self._desired = Desired(config, preset, 1, 1, self._links)
        self.sync.apply(self._desired)
        # The daemon listens to changes, so the kernel writes a notice for each element.
        self._notices = RulesetMonitor(())
        self._generation = 1

    def times_ms(self, case: Case) -> tuple[float, float]:
        """Caches the verdicts of the case, and revokes its prefixes. Returns the milliseconds until that is
        enforced, and until no old verdict is cached."""
        for set_ in _EVEN:
            keys = case.keys(set_) if set_ in case.sets else []
            self.kernel.commit([Flush(set_), *([Add(set_, keys)] if keys else [])])
        list(self._cache.elements())
        self._generation += 1
        changed, opens = case.changed(), case.opens
        self._desired = self._desired._replace(generation=self._generation, revision=self._generation)
        committed = Committed(self._generation, self._generation, changed, opens=opens, closes=not opens)
        self.kernel.enforced_at = 0.0
        began = time.monotonic()
        self.sync.apply(self._desired, committed)
        took = (self.kernel.enforced_at - began) * 1000, (self.kernel.synced_at - began) * 1000
        self._check(committed.changed)
        return took

    def _check(self, places: Sequence[ChangedPlace]) -> None:
        revoked = Prefixes()
        for place in places:
            revoked.add(self._links[place.segment], place.network)
        left = revoked.among("6", [key for set_ in ("allow6", "deny6") for key, _, _ in self.kernel.rows(set_)])
        if left or self.sync.broken or self._cache.synced() != self._generation:
            raise RuntimeError(f"{len(left)} revoked sources are still cached")

    def cached(self) -> int:
        """How many verdicts are cached."""
        return sum(1 for _ in self._cache.elements())


def measure(folder: Path, rounds: int = _ROUNDS) -> list[Figure]:
    """`prefixes_…_enforced_p99_ms` and `…_synced_p99_ms` for each case, and how many verdicts stayed cached."""
    figures = []
    for case in CASES:
        name = lab_name()
        namespaces.make(name)
        try:
            with namespaces.inside(name):
                gateway = Gateway(case.links)
                times = [gateway.times_ms(case) for _ in range(rounds)]
                left = gateway.cached()
        finally:
            namespaces.remove(name)
        unit = f"ms (from: median, to: largest); {case.revoked} /64s revoked, {left} of {case.cached} stay cached"
        enforced, synced = [first for first, _ in times], [second for _, second in times]
        for when, found, goal in (("enforced", enforced, case.goal), ("synced", synced, "")):
            p99, median = percentile(found, 0.99), percentile(found, 0.5)
            figures.append(Figure(f"prefixes_{case.name}_{when}_p99_ms", p99, median, max(found), unit, goal))
    return figures
