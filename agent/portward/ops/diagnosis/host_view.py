"""The effect of this host now on the sources of an account, as `explain` says it for one source."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from msgspec.structs import replace

from portward.config.keys import Config
from portward.dataplane import stacking
from portward.errors import PortwardError
from portward.model import Address
from portward.ops import effect, host
from portward.ops.diagnosis.facts import Machine
from portward.ops.diagnosis.outcome import Blocking, outcome
from portward.ops.effect import Handling, Now, Policy
from portward.ops.host_state import CachedState, Host, Ruleset
from portward.ops.segment_interfaces import behind, devices


class HostView:
    """The state of this host, read once for each segment."""

    def __init__(self, config: Config) -> None:
        self._config, self._devices, self._bridged = config, devices(), host.bridged()
        self._at = cache(self._at_segment)
        self._behind = cache(lambda segment: behind(config, segment, self._devices))

    def elsewhere(self, segments: Iterable[str]) -> str:
        """The process that enforces here instead of an agent on this table, or another reason why it is unknown
        what happens to one of these segments; empty if it is known."""
        return next(filter(None, (self._at(segment).elsewhere for segment in segments)), "")

    def stacked(self, segments: Iterable[str]) -> tuple[str, ...]:
        """A sentence for each device that takes packets of these segments before portward sees them."""
        names = {name for segment in segments for name in self._behind(segment)}
        return tuple(stacking.concerning(self._devices, self._config, names, bridged=self._bridged))

    def places(self, segments: Iterable[str]) -> dict[str, Handling]:
        """For each of these segments that is an interface here: how its sources without a cached verdict are
        handled."""
        present = sorted(segment for segment in set(segments) if self._behind(segment))
        return {segment: effect.handling(self._at(segment)) for segment in present}

    def met(self, machine: Machine, *, limited: bool, source: Address | None = None) -> Machine:
        """The machine with what happens to it. For a prefix: to `source`, if that was asked about."""
        one = machine.address.prefixlen == machine.address.max_prefixlen
        address = machine.address.network_address if one and source is None else source
        verdict = "allow" if machine.reason.allows else "deny"
        policy = Policy(verdict=verdict, observed=machine.observed, limited=limited)
        made, found = self.source(machine.segment, address, policy)
        return replace(machine, now=made, outcome=found)

    def source(self, segment: str, address: Address | None, policy: Policy) -> tuple[Now, Blocking]:
        """The effect on a source. The address None stands for all sources of a prefix."""
        state = self._at(segment)
        if not self._behind(segment) and not state.elsewhere:
            # This host gets no packets of this source.
            return effect.now(Host(), None, policy), Blocking.UNKNOWN
        try:
            cached = self._cached(segment, address)
        except (OSError, PortwardError):
            state, cached = replace(state, ruleset=Ruleset.NOT_PERMITTED), None
        how = effect.handling(state)
        left = None
        if how is Handling.UNWATCHED and address is not None:
            left = host.left(self._config, self._behind(segment), address)
        made = effect.now(state, cached, policy, left)
        passes = policy.verdict == "allow" or policy.observed
        return made, outcome(how, made, passes=passes, prefix=address is None, opens=state.opens)

    def _at_segment(self, segment: str) -> Host:
        seen = host.look(self._config, [segment])
        return host.at_interfaces(seen, self._devices, self._config, self._behind(segment))

    def indexes(self, segment: str) -> tuple[int, ...]:
        """The indexes of the interfaces that are behind a segment here now."""
        return tuple(self._behind(segment).values())

    def _cached(self, segment: str, address: Address | None) -> CachedState | None:
        interfaces = self._behind(segment)
        if address is None:
            return CachedState() if interfaces else None
        return host.cached(interfaces, address)
