"""The facts about an account and its machines at one time. Pure."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

import msgspec

from portward.exemptions.lifecycle import State, state_of
from portward.model import Exemption, Network, Reason, Subscription, Workload
from portward.ops.diagnosis.outcome import Blocking
from portward.ops.effect import Handling, Now
from portward.policy.decide import rule
from portward.policy.preset import Preset


class FactSource(StrEnum):
    """Where the facts were read."""

    TABLE = "table"
    STORE = "store"


class Kernel(StrEnum):
    """Whether the kernel's counters of drops are known.

    NO_INTERFACE: no segment of the machines is an interface of this host. AWAY: the agent enforces in another
    network namespace.
    """

    ASKED = "asked"
    NO_INTERFACE = "no-interface"
    NO_RULESET = "no-ruleset"
    NOT_PERMITTED = "not-permitted"
    AWAY = "away"


class Metrics(StrEnum):
    """Whether the agent's counters are known."""

    READ = "read"
    NO_AGENT = "no-agent"
    OFF = "off"
    UNREACHABLE = "unreachable"


class Drops(msgspec.Struct, frozen=True):
    """Packets of a machine that the kernel's elements have counted. An element lives for about a minute.

    `refused`: refused packets. `beyond_limit`: new connections beyond the rate limit of an exemption. `observed`:
    packets that passed only because the rule is observed. `sources`: the number of addresses that sent them.
    `nobody`: the source is cached as one of an unknown subscription; such packets are not counted.
    """

    refused: int = 0
    beyond_limit: int = 0
    observed: int = 0
    sources: int = 0
    nobody: bool = False

    def __add__(self, other: Drops) -> Drops:
        return Drops(
            self.refused + other.refused,
            self.beyond_limit + other.beyond_limit,
            self.observed + other.observed,
            self.sources + other.sources,
            self.nobody or other.nobody,
        )


class Machine(msgspec.Struct, frozen=True):
    """An attachment: an address or a prefix.

    `observed`: the rule is only observed. `drops` is None if the kernel's counters are unknown. `now` is what
    happens on this host; for a prefix, to sources without a cached verdict.
    """

    segment: str
    address: Network
    reason: Reason
    workload: Workload = Workload.VM
    started: datetime | None = None
    observed: bool = False
    drops: Drops | None = None
    now: Now | None = None
    outcome: Blocking = Blocking.UNKNOWN


class SinceStart(msgspec.Struct, frozen=True):
    """Packets of the subscription that this agent and those before it have counted since `started`. Packets of the
    last `age` seconds may be missing."""

    started: datetime
    age: int
    refused: int
    beyond_limit: int


class Asked(msgspec.Struct, frozen=True):
    """A source that was asked about."""

    segment: str
    address: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a diagnosis is made from.

    `asked` is the source in question, if a source was given; its machine then comes first in `machines`. For a
    source of an unknown subscription, `now` and `outcome` say what happens to it, and `observed` whether its
    segment is only observed. `id` is the subscription of the account; `subscription` is None if there is no record
    of it.

    `here` is how this host handles sources without a cached verdict; None if no machine's segment is an interface
    of this host. `places` has the same for each segment. `stacked` has a sentence for each device that takes
    packets of these segments before portward sees them. `elsewhere` is the process that enforces here instead of
    an agent on this table. `behind` is what the store has and the running agent's table has not.

    `remembered` is for how many seconds the kernel counts what it drops.
    """

    at: datetime
    place: FactSource
    revision: int
    preset: str
    other_preset: bool = False
    id: UUID | None = None
    subscription: Subscription | None = None
    exemption: Exemption | None = None
    machines: tuple[Machine, ...] = ()
    asked: Asked | None = None
    kernel: Kernel = Kernel.ASKED
    remembered: int = 60
    nobody: Drops | None = None
    here: Handling | None = None
    places: dict[str, Handling] = {}
    stacked: tuple[str, ...] = ()
    elsewhere: str = ""
    behind: str = ""
    now: Now | None = None
    outcome: Blocking = Blocking.UNKNOWN
    observed: bool = False
    metrics: Metrics = Metrics.NO_AGENT
    since_start: SinceStart | None = None

    @property
    def state(self) -> State:
        """The state of the exemption at `at`."""
        return state_of(self.exemption, self.at)

    @property
    def drops(self) -> Drops | None:
        """The drops of all machines together; None if they are unknown for every machine."""
        known = [machine.drops for machine in self.machines if machine.drops is not None]
        return sum(known, Drops()) if known else None

    def reason_of_machines(self, preset: Preset) -> Reason:
        """The reason for the account's virtual machines, whatever their last start. A grant that needs a restart
        gives DENIED_RESTART_REQUIRED."""
        return rule(preset, self.subscription, self.exemption, Workload.VM, now=self.at).reason
