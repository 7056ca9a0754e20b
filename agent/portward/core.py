"""A gateway's work, step by step: store, links and ruleset on the one side, table and kernel on the other.

Each method is one step and runs to its end. They are to be called on one thread: so no two changes ever meet
in the table or in the kernel. Nothing here waits for anything.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Iterable
from datetime import datetime
from ipaddress import ip_address
from typing import Final

from portward.clock import Clock
from portward.config import Config, Refusal
from portward.errors import KernelError, StoreError
from portward.gateway import mark, ruleset, xtables
from portward.gateway.around import Lookout
from portward.gateway.counts import Counts, Owner
from portward.gateway.enforcement import Enforcement
from portward.gateway.judge import judge
from portward.gateway.keeper import Keeper
from portward.gateway.learned import Element, Learned, Source
from portward.gateway.links import Links
from portward.gateway.nfnetlink import NfNetlink
from portward.gateway.nft import Nft
from portward.gateway.rates import Bucket, Rates
from portward.gateway.ruleset import Rated
from portward.gateway.surroundings import NOTHING, Surroundings
from portward.gateway.tally import Outcome
from portward.interfaces import shown
from portward.model import ExemptionState, Mode
from portward.policy.preset import Preset
from portward.selfcheck import SAMPLE, Kind, SelfCheck
from portward.store import open_store
from portward.store.flips import HeldError
from portward.store.protocol import Store
from portward.table.database import TableError
from portward.table.follower import Follower, Held
from portward.table.reader import Reader
from portward.table.writer import Answers, Committed, Writer

# Differences of one kind that are told one by one.
_TOLD: Final = 10

_log = logging.getLogger("portward")


def answers(config: Config) -> Answers:
    """What the configuration says of every verdict."""
    return Answers(config.mode is Mode.OBSERVE, config.verdicts.refuse_with is Refusal.REJECT)


class Core:
    """The gateway of one network namespace."""

    def __init__(self, config: Config, preset: Preset) -> None:
        """Opens kernel and table; changes nothing in the kernel. Raises KernelError or TableError."""
        self.config, self.preset = config, preset
        self._netlink = NfNetlink()
        self._nft = Nft(self._netlink.generation)
        self._ask_privilege()
        self.native = xtables.has_native_queue(self._nft)
        if not self.native:
            xtables.require(self._netlink)
        self._learned = Learned(self._nft, self._netlink)
        self.keeper = Keeper(self._nft, self._netlink, self._learned)
        self._writer = Writer(config.table, preset, answers(config), max_flip_share=config.max_flip_share)
        head = self._writer.head()
        self.clock = Clock(None if head is None else head.decided())
        self._reader = self._writer.reader()
        self._subscriptions: dict[int, str] = {}
        # Counting goes on beside everything else, on a thread, a socket and a view of the table of its own: to
        # read the elements of full sets takes half a second.
        self._counting = NfNetlink()
        self._watching = NfNetlink()
        self._counted = Learned(self._nft, self._counting)
        self._counting_reader = self._writer.reader()
        self.counts = Counts(self._owner)
        self.selfcheck = SelfCheck()
        self._sample: list[Element] = []
        self._rates_seen: dict[Source, Bucket] = {}
        self._rates = Rates(self._nft, self._netlink)
        self._enforcement = Enforcement(
            self.keeper, self._learned, self._want, self._count_last, self._rates, self.rate
        )
        self._store: Store | None = None
        self._follower: Follower | None = None
        self._links = Links({}, frozenset())
        self._surroundings = NOTHING
        self.lookout = Lookout()
        # Interfaces that changed while the table could not be written.
        self._links_failed, self._links_due = False, frozenset[int]()
        self.changes = 0
        # The revision that the kernel acts on: the table's, once everything older is forgotten.
        self.enforced = 0
        self.store_errors = 0
        self.store_error = ""
        self.store_read: float | None = None

    def close(self) -> None:
        """Closes table, store and sockets; ruleset and remembered verdicts stay in the kernel."""
        self._writer.close()
        self._netlink.close()
        self._counting.close()
        self._watching.close()
        if self._store is not None:
            self._store.close()

    # --- the start, in this order ---

    def first_policy(self) -> None:
        """Sees to it that there is a policy to enforce. A table of an earlier run serves as it is: what has
        changed in the store since is taken in once the gateway enforces. Without one the store is read first;
        raises StoreError where that is not to be had either."""
        head = self._writer.head()
        if head is None or not any(head.store):
            self._sync()
        self._writer.settle(now=self.clock.now())

    def first_links(self, links: Links) -> None:
        """Says which interfaces are segments, and what stands on them, before the ruleset is there."""
        self._put_links(links)
        self._surroundings = self._around()

    def load(self) -> None:
        """Loads the ruleset; from here on the gateway enforces. Raises KernelError."""
        if self._enforcement.start(self.generation):
            _log.info("the kernel remembered verdicts of another policy: they are forgotten")
        self.enforced = self.revision

    # --- and then, again and again ---

    def sync(self) -> bool:
        """Takes in what is new in the store and enforces it; False where nothing was or could be."""
        try:
            committed = self._sync()
        except (StoreError, TableError) as error:
            self.store_errors += 1
            if str(error) != self.store_error:
                _log.error("the last known policy stays in force: %s", error)
            self.store_error = str(error)
            self._forget_store()
            return False
        if committed is not None:
            self._enforcement.enforce(committed)
            self.enforced = committed.revision
        return committed is not None

    def links_changed(self, links: Links) -> None:
        """Follows interfaces that came, went or changed their index. Where the table cannot be written, `check`
        tries it again."""
        links = links._replace(touched=links.touched | self._links_due)
        self._links = links
        # First of all: what stands on a segment lets its packets pass until then.
        self.look_around()
        try:
            committed = self._put_links(links)
        except TableError as error:
            if not self._links_failed:
                _log.error("new interfaces are not judged yet, all their packets are dropped: %s", error)
            self._links_failed, self._links_due = True, links.touched
            return
        self._links_failed, self._links_due = False, frozenset()
        self._enforcement.enforce(committed)

    def look_around(self) -> None:
        """Finds the tunnels that end here and the devices on top of segments, and loads the ruleset again if they
        are others. FOU, L2TP and WireGuard announce nothing, so it is called again and again."""
        self.surround(self._around())

    def _around(self) -> Surroundings:
        return self.lookout.look(self._links.devices, self.config, self._surroundings)

    def surround(self, surroundings: Surroundings) -> None:
        """Loads the ruleset again if what stands around it has changed. Cached verdicts stay. What the kernel
        refuses is repaired by `check`."""
        if surroundings == self._surroundings:
            return
        new = surroundings.stacked - self._surroundings.stacked
        self._surroundings = surroundings
        if new:
            with contextlib.suppress(KernelError):  # without a ruleset there is nothing to add to
                self.keeper.add(ruleset.stacked_alone(self.config, self.preset, surroundings))
        try:
            self.keeper.load(self._want())
        except (KernelError, OSError):
            self._enforcement.repair(self.generation)

    def settle(self) -> None:
        """Enforces what changes by itself: grants that end."""
        try:
            self._enforcement.enforce(self._writer.settle(now=self.clock.now()))
        except TableError as error:
            self.store_errors += 1
            _log.error("a grant has ended and still counts, until the table can be written: %s", error)

    def check(self) -> None:
        """Puts the ruleset back where somebody has changed it."""
        if self._links_failed:
            self.links_changed(self._links)
        else:
            self.look_around()
        before = self.keeper.repairs
        self._enforcement.check(self.generation)
        if self.keeper.repairs != before:
            self.selfcheck.differs(Kind.RULESET, "the ruleset was not the one that was loaded: it is put back")

    def at_rest(self) -> bool:
        """Whether `check` has nothing to do: nobody has written a ruleset since. It is asked on the thread that
        waits, so that the one that works is woken for a reason only."""
        with contextlib.suppress(OSError, KernelError):
            behind = self._enforcement.generation != self.generation
            return not (self._links_failed or self.broken or behind) and self.keeper.at_rest(self._watching)
        return False

    def correct(self, suspects: list[Source]) -> None:
        """Makes the kernel forget those of these sources whose remembered verdict is not the table's. Here no
        change of policy can come between the two readings."""
        if self.broken:  # the ruleset comes first, and with it everything is forgotten
            return
        with contextlib.suppress(OSError, KernelError):
            held = [found for source in suspects if (found := self._learned.held(source)) is not None]
            wrong = [element for element in held if self._differs(self._reader, element)]
            if not wrong:
                return
            self._enforcement.forget([element.source for element in wrong], self.generation)
            for element in wrong:
                address = ip_address(element.source.address)
                self.selfcheck.differs(
                    Kind.REMEMBERED,
                    f"the kernel remembered {element.verdict.name.lower()} for {address} behind interface "
                    f"{element.source.link}, which is not the table's verdict: forgotten",
                )

    def keep_rates(self) -> None:
        """Sees to it that the limits in the kernel are those of the table, and that none is there in vain."""
        self._correct_rates()
        self._collect_rates()

    def _correct_rates(self) -> None:
        """Makes the kernel forget the limits of sources that have another one, or none, and knows again which
        limits are there, where somebody else has changed that. Of what is as it was left a sample is looked at."""
        if self.broken:
            return
        with contextlib.suppress(OSError, KernelError):
            same = self._rates.is_held(self._rates_seen)
            if not same:  # a change of policy may have come between, too
                self._rates.read()
            sources = list(self._rates.sources())
            looked_at = random.sample(sources, min(len(sources), SAMPLE)) if same else sources
            wrong = [source for source in looked_at if self._bucket(source) != self._rates.bucket(source)]
            if not wrong:
                return
            self._enforcement.forget(wrong, self.generation)
            for source in wrong[:_TOLD]:
                self.selfcheck.differs(
                    Kind.REMEMBERED,
                    f"the kernel let {ip_address(source.address)} behind interface {source.link} send within a "
                    "limit that is not the table's: forgotten",
                )

    def asked(self, sources: Iterable[Source]) -> None:
        """Lets sources send within their limit that a worker has met: so the kernel does not know them."""
        sources = list(sources)
        with contextlib.suppress(OSError):
            self._rates.doubt(sources)
        self.rate(sources)

    def rate(self, sources: Iterable[Source]) -> None:
        """Lets those of these sources whose exemption carries a limit send within it. What the kernel does not
        take is asked for again by the source's next packet."""
        found = ((source, self._bucket(source)) for source in sources)
        wanted = {source: bucket for source, bucket in found if bucket is not None}
        try:
            self._rates.add(wanted)
        except KernelError as error:
            _log.warning("sources with a limit stay blocked until they are tried again: %s", error)
            with contextlib.suppress(OSError):
                self._rates.read()

    def _collect_rates(self) -> None:
        """Takes limits out of the kernel that are not in force any more."""
        with contextlib.suppress(KernelError):  # somebody has changed the ruleset: `check` puts it right
            self._rates.collect(lambda bucket: self._limit(bucket.subscription) == bucket)

    def reload(self, config: Config, preset: Preset) -> None:
        """Takes another configuration and enforces it; raises KernelError, TableError, or HeldError for a preset
        that would flip too many subscriptions, and then nothing has changed. What fails once the table was decided
        anew does not take it back: it is told, and `check` tries it until it works."""
        before = self.config, self.preset
        try:
            self._take(config, preset)
            self._surroundings = self._around()
            self.keeper.check(self._want())
            # Another preset may flip no more than another inventory.
            settled = self._writer.settle(now=self.clock.now(), may_flip=preset.digest == before[1].digest)
        except (KernelError, TableError, HeldError):
            self._take(*before)
            self._surroundings = self._around()
            raise
        try:
            linked = self._put_links(self._links)
            self.keeper.load(self._want())
            self._rates.read()
        except (KernelError, TableError, OSError) as error:
            _log.error("the configuration is in force in part, and is tried again: %s", error)
            self._links_failed = True
            self._enforcement.repair(self.generation)
            return
        self._enforcement.enforce(settled)
        self._enforcement.enforce(linked)

    def _take(self, config: Config, preset: Preset) -> None:
        self.config, self.preset = config, preset
        self._writer.preset, self._writer.answers = preset, answers(config)
        self._writer.max_flip_share = config.max_flip_share

    # --- and on a thread of its own ---

    def count(self) -> None:
        """Adds up what the kernel has counted since the last time; nothing where the ruleset is not there."""
        with contextlib.suppress(OSError):
            self.counts.take_all(self._elements, time.monotonic)
            self._rates_seen = Rates.loaded(self._counting)

    def suspects(self) -> list[Source]:
        """The sources, of a sample of those that `count` read last, whose remembered verdict is not the table's
        now. A change of policy under way makes suspects too: `correct` looks again."""
        return [element.source for element in self._sample if self._differs(self._counting_reader, element)]

    def limited(self) -> dict[str, int]:
        """Packets refused beyond a segment's rate, by segment."""
        names = self._links.names
        with contextlib.suppress(OSError):
            return {
                shown(names.get(index, str(index))): packets for index, packets in self._counted.limited().items()
            }
        return {}

    def screen(self) -> dict[str, int]:
        """The named counters of the ruleset."""
        with contextlib.suppress(OSError):
            return self._counting.counters(ruleset.TABLE)
        return {}

    def _elements(self) -> list[Element]:
        found = list(self._counted.elements())
        # A verdict that passes what it must not is the worse mistake, and there are fewer of them.
        verdicts = [element for element in found if not isinstance(element.verdict, Rated)]
        passing = [element for element in verdicts if element.verdict in mark.PASSING]
        stopping = [element for element in verdicts if element.verdict not in mark.PASSING]
        self._sample = [one for part in (passing, stopping) for one in random.sample(part, min(len(part), SAMPLE))]
        return found

    def _bucket(self, source: Source) -> Bucket | None:
        """The limit under which a source may send; None where it may not, or without one."""
        finding = self._reader.lookup(source.link, source.address)
        if finding is None or not finding.limited or finding.observed:
            return None
        owner = self._reader.owner(source.link, source.address)
        return None if owner is None or owner[1] is None else self._limit(owner[1].subscription)

    def _limit(self, subscription: int) -> Bucket | None:
        """The limit of a subscription (the table's number) that an exemption grants."""
        account = self._reader.account(subscription)
        exemption = None if account is None else account.exemption
        if exemption is None or exemption.state is not ExemptionState.GRANTED or exemption.limit is None:
            return None
        return Bucket.of(subscription, exemption.limit)

    @staticmethod
    def _differs(reader: Reader, element: Element) -> bool:
        finding = reader.lookup(element.source.link, element.source.address)
        if finding is None:
            return True
        verdict, outcome = judge(finding)
        # One with a limit must not be remembered as allowed: that would be without it.
        return outcome is Outcome.DEFERRED or verdict is not element.verdict

    # --- what they are made of ---

    @property
    def generation(self) -> int:
        """The generation of the policy table."""
        head = self._writer.head()
        return 0 if head is None else head.generation

    @property
    def revision(self) -> int:
        """The revision of the store that the table stands at."""
        head = self._writer.head()
        return 0 if head is None else head.revision

    @property
    def broken(self) -> str:
        """Why the kernel does not have the ruleset that it should have; empty where it has."""
        return self._enforcement.broken

    @property
    def refused(self) -> int:
        """Records of the store that could not be read."""
        return 0 if self._follower is None else self._follower.refused

    @property
    def held(self) -> Held | None:
        """The change of policy that waits for confirmation; None where none does."""
        return None if self._follower is None else self._follower.held

    def next_expiry(self) -> datetime | None:
        """When `settle` is next due."""
        return self._writer.next_expiry()

    def bell(self) -> int | None:
        """A descriptor that can be read when the store has changed; None while there is no store."""
        return None if self._store is None else self._store.fileno()

    def segments(self) -> dict[int, str]:
        """The interfaces that are segments: index → name."""
        return {index: name for index, name in self._links.names.items() if self.config.segment(name)}

    def sizes(self) -> tuple[int, int]:
        """Attachments and subscriptions in the table."""
        return self._reader.counts()

    def _ask_privilege(self) -> None:
        try:
            self._nft.check(f"add table {ruleset.FAMILY_TABLE}\n")
        except KernelError as error:
            raise KernelError(
                f"the kernel takes no ruleset from this process (root or CAP_NET_ADMIN?): {error}"
            ) from None

    def _want(self) -> ruleset.Wanted:
        state = ruleset.State(self.generation, synced=self._learned.synced() == self.generation)
        return ruleset.wanted(
            self.config, self.preset, native=self.native, state=state, surroundings=self._surroundings
        )

    def _sync(self) -> Committed | None:
        if self._store is None:
            self._store = open_store(self.config.store)
            self._follower = Follower(self._store, self._writer)
        assert self._follower is not None  # noqa: S101 # made with the store
        self._store.drain()
        committed = self._follower.step(self.clock.now())
        self.store_read, self.store_error = time.monotonic(), ""
        if committed is not None:
            self.changes += 1
            self._subscriptions.clear()
        return committed

    def _forget_store(self) -> None:
        if self._store is not None:
            self._store.close()
        self._store = None

    def _put_links(self, links: Links) -> Committed:
        self._links = links
        segments = self.segments()
        self._enforcement.links = {name: index for index, name in segments.items()}
        want = {index: (name, self.config.observes(name)) for index, name in segments.items()}
        return self._writer.put_links(want, touched=links.touched, now=self.clock.now())

    def _count_last(self, elements: list[Element]) -> None:
        self.counts.take_last(elements, time.monotonic())

    def _owner(self, source: Source) -> Owner | None:
        found = self._counting_reader.owner(source.link, source.address)
        if found is None:
            return None
        link, entry = found
        return Owner(shown(link.name), "" if entry is None else self._subscription(entry.subscription))

    def _subscription(self, number: int) -> str:
        known = self._subscriptions.get(number)
        if known is None:
            account = self._counting_reader.account(number)
            known = self._subscriptions[number] = "" if account is None else str(account.id)
        return known
