"""A gateway's data plane on a fake kernel, and its transactions in words."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Final

from portward.config.keys import Config
from portward.dataplane import ruleset
from portward.dataplane.deletions import Deletions
from portward.dataplane.desired import NOTHING, Desired, SegmentLinks, Unsettled
from portward.dataplane.elements import (
    Add,
    AddLimit,
    Change,
    Delete,
    DeleteLimit,
    DeleteRule,
    Draw,
    Flush,
    InsertRule,
)
from portward.dataplane.fake import FakeKernel, Transaction
from portward.dataplane.names import COUNTED_SETS, RATE_LIMITS, TABLE, VERDICT_SETS
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.rate_limits import Bucket, RateLimits
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.sync import Found, KernelSync
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.ipc import mark
from portward.policy import presets
from portward.table.commits import ChangedPlace, Committed

CONFIG: Final = Config(segments=("vni*",), uplinks=("up0",))
PRESET: Final = presets.load("azure-2020")
SEGMENT: Final = "vni1"
LINK: Final = 3


def source(address: str, link: int = LINK) -> Source:
    """A source behind an interface."""
    return Source(link, ip_address(address).packed)


def committed(
    generation: int, *changed: str, links: Iterable[int] = (), everything: bool = False, segment: str = SEGMENT
) -> Committed:
    """A change of the policy table: prefixes of a segment, interfaces, or everything."""
    places = tuple(ChangedPlace(segment, ip_network(network)) for network in changed)
    return Committed(generation, generation, places, frozenset(links), everything)


class Plane:
    """All that writes a kernel, as `Core` puts it together. `generation` is the policy table's."""

    def __init__(
        self,
        kernel: FakeKernel,
        generation: int = 1,
        config: Config = CONFIG,
        *,
        netlink: NfNetlink | None = None,
        nft: Nft | None = None,
    ) -> None:
        """`netlink` and `nft`, if given, belong to another kernel than the fake one."""
        self.kernel, self.generation, self.config = kernel, generation, config
        self.links: SegmentLinks = {SEGMENT: (LINK,)}
        fake = kernel.netlink()
        self.netlink, self.nft = netlink or fake, nft or kernel.nft(fake)
        self.deletions = Deletions()
        self.elements = KernelElements(self.netlink, self.deletions)
        self.cache = VerdictCache(self.elements)
        self.reconciler = RulesetReconciler(self.nft, self.netlink, self.cache)
        self.rate_limits = RateLimits(self.elements)
        self.limits: dict[Source, Bucket] = {}
        self.sync = KernelSync(self.reconciler, self.cache, self.rate_limits, self._rate, native=kernel.native)
        self.unsettled = Unsettled()
        self.preset, self.surroundings = PRESET, NOTHING

    @property
    def desired(self) -> Desired:
        """The state that the kernel should have."""
        return Desired(
            self.config, self.preset, self.generation, self.generation, self.links, self.surroundings,
            self.unsettled.indexes,
        )  # fmt: skip

    def want(self, generation: int) -> ruleset.Wanted:
        """The ruleset for a generation of the policy table."""
        synced = self.cache.synced() == generation
        return self.sync.wanted(self.desired._replace(generation=generation), synced=synced)

    def start(self) -> bool:
        """Starts enforcing. True if verdicts of another policy were cached."""
        return self.sync.apply(self.desired) is Found.STALE

    def enforce(self, change: Committed, settled: int = 0) -> None:
        """Carries a change of the policy table out, which has been committed there. The table names the owners of
        interfaces as of event number `settled`."""
        self.generation = change.generation
        self.unsettled.settle(settled)
        self.sync.apply(self.desired, change)

    def unsettle(self, link: int, event: int) -> None:
        """An interface has another owner, which the table does not name yet."""
        self.unsettled.add([link], event)
        self.sync.apply(self.desired)

    def check(self) -> bool:
        """Checks the ruleset, as the daemon does periodically. True if it was unchanged."""
        return self.sync.apply(self.desired) is Found.AS_LEFT

    def learn(self, verdict: mark.Class, *sources: Source, generation: int | None = None) -> bool:
        """Packets come back from a worker whose table has `generation` (None: the present one). The chain `learn`
        caches each verdict if its epoch is the kernel's. Returns whether all were cached."""
        asked = mark.epoch_of(self.generation if generation is None else generation)
        if self.cache.epoch() != asked:
            return False
        return all(self.kernel.learn(VERDICT_SETS[verdict] + one.family, one.key) for one in sources)

    def cached(self) -> dict[Source, mark.Class]:
        """Every cached verdict."""
        return {
            Source.of(key): verdict
            for verdict, name in VERDICT_SETS.items()
            for family in "46"
            for key in self.kernel.tables[TABLE].sets[name + family].elements
        }

    def _rate(self, sources: Iterable[Source]) -> None:
        self.rate_limits.add({one: self.limits[one] for one in sources if one in self.limits})


def words(journal: Iterable[Transaction]) -> list[str]:
    """The transactions in words, one line each. Changes of the same kind to all sets of cached verdicts are one:
    `forget 3 . 10.0.0.4`, `forget everything`. Those of the set of coming epochs are left out."""
    return [_line(transaction.done) for transaction in journal]


def _line(done: str | tuple[Change | str, ...]) -> str:
    if isinstance(done, str):
        first = done.strip().partition("\n")[0]
        return "load the ruleset" if "chain screen" in done else first
    parts = list(dict.fromkeys(_word(one) for one in done if getattr(one, "set", None) != "coming"))
    for family in "46":
        for start in [part.removeprefix(f"add allow{family} ") for part in parts if f"add allow{family} " in part]:
            whole = [
                f"{verb} {name}{family} {start}" for name in VERDICT_SETS.values() for verb in ("add", "delete")
            ]
            parts = _instead(parts, whole, f"forget {start}")
    every = [f"flush {name}{family}" for name in (*COUNTED_SETS.values(), RATE_LIMITS) for family in "46"]
    return ", ".join(_instead(parts, every, "forget everything"))


def _instead(parts: list[str], whole: list[str], word: str) -> list[str]:
    """The parts with one word in place of `whole`, if all of it is there, in this order."""
    if [part for part in parts if part in whole] != whole:
        return parts
    place = parts.index(whole[0])
    return [*parts[:place], word, *(part for part in parts[place:] if part not in whole)]


def _word(change: Change | str) -> str:
    match change:
        case str():
            return change
        case Add(set_, keys):
            return f"add {set_} {_keys(set_, keys)}"
        case Delete(set_, keys):
            return f"delete {set_} {_keys(set_, keys)}"
        case Flush(set_):
            return f"flush {set_}"
        case AddLimit(name, per_minute, burst):
            return f"limit {name} {per_minute}/minute burst {burst}"
        case DeleteLimit(name):
            return f"delete limit {name}"
        case Draw(map_, limits):
            return f"draw {map_} " + " ".join(f"{Source.of(key)}: {name}" for key, name in limits.items())
        case InsertRule(chain, set_, target):
            return f"insert {chain} iif @{set_} goto {target}"
        case DeleteRule(chain):
            return f"delete a rule of {chain}"


def _keys(set_: str, keys: Iterable[bytes]) -> str:
    if set_ in ("epoch", "recent", "coming", "synced", "enforced", "gated", "unsettled", "renewed", "definitions"):
        return " ".join(
            str(struct.unpack("=I", key)[0] >> (3 if set_ in ("epoch", "recent", "coming") else 0)) for key in keys
        )
    return " ".join(str(Source.of(key)) for key in keys)
