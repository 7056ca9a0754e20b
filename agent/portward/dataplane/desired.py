"""The desired state of the kernel as one value. `KernelSync.apply` brings the kernel in line with it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from portward.config.keys import Config
from portward.policy.preset import Preset

# Name of a segment → the indexes of its interfaces: one, or any number if it is an interface group.
SegmentLinks: TypeAlias = Mapping[str, tuple[int, ...]]


class Surroundings(NamedTuple):
    """The facts about the host that the ruleset depends on: tunnels, devices on top of segments, and whether
    others translate packets. The daemon keeps them up to date. `portward rules baseline`, which runs without a
    daemon, reads them once.

    `tunnel_ports` are the UDP ports at which tunnels end on this host, `encrypted_ports` those of WireGuard.
    `stacked` are the indexes of interfaces that take packets of an enforced segment before portward sees the
    segment's name (a bridge that the segment is a port of, a macvlan on top of it). `known` are the indexes of all
    interfaces beside the segments that are classified: mail from an interface that is neither a segment nor an
    uplink nor one of these is dropped, because a device that was put on a segment a moment ago is one. `guard`
    says whether the forward chain is needed that classifies what others translated."""

    tunnel_ports: frozenset[int] = frozenset()
    encrypted_ports: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()
    known: frozenset[int] = frozenset()
    guard: bool = False


NOTHING: Final = Surroundings()


class Desired(NamedTuple):
    """The desired state of the kernel: the ruleset of a configuration and a preset in these surroundings, and
    verdicts of the policy table at one generation.

    `generation` is the table's, `revision` is that of the store that the table has loaded. `links` are the
    interfaces of each segment. `unsettled` are the indexes of interfaces that the table still takes for others:
    what comes from them is dropped."""

    config: Config
    preset: Preset
    generation: int = 0
    revision: int = 0
    links: SegmentLinks = MappingProxyType({})
    surroundings: Surroundings = NOTHING
    unsettled: frozenset[int] = frozenset()

    def bridged(self) -> Desired:
        """The desired state of the table `bridge`. Translation by others, and the place to which a device on top
        of a segment sends packets, are matters of routing. Such a device may be a port, too: it is not a
        known interface there, so no mail from it passes."""
        around = self.surroundings
        known = around.known - around.stacked
        return self._replace(surroundings=around._replace(stacked=frozenset(), known=known, guard=False))

    def same_ruleset(self, other: Desired) -> bool:
        """Whether both need the same ruleset. The known interfaces are not part of it: they are written alone."""
        return (self.config, self.preset) == (other.config, other.preset) and self.surroundings._replace(
            known=frozenset()
        ) == other.surroundings._replace(known=frozenset())


class Unsettled:
    """Interfaces whose index belonged to another one before, until the table names the new owner. Changes of
    interfaces are numbered events."""

    def __init__(self) -> None:
        self._events: dict[int, int] = {}  # index → number of the event that gave it another owner
        self._settled = 0

    def add(self, indexes: Iterable[int], event: int) -> None:
        """These indexes have another owner by event number `event`. Nothing happens if the table has taken that
        event in already, because nothing would ever settle them."""
        if event > self._settled:
            self._events |= dict.fromkeys(indexes, event)

    def settle(self, event: int) -> None:
        """The table names the owners of all interfaces as of event number `event`."""
        self._settled = max(self._settled, event)
        self._events = {index: since for index, since in self._events.items() if since > event}

    @property
    def indexes(self) -> frozenset[int]:
        """The interfaces that the table still takes for others."""
        return frozenset(self._events)
