"""What is known of an account and of its machines at a time."""

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
    """Whether the kernel said what it dropped; NO_INTERFACE: the segment of a machine is not on this host; AWAY:
    the agent enforces in another network namespace."""

    ASKED = "asked"
    NO_INTERFACE = "no-interface"
    NO_RULESET = "no-ruleset"
    NOT_PERMITTED = "not-permitted"
    AWAY = "away"


class Metrics(StrEnum):
    """Whether the agent's own counters are known."""

    READ = "read"
    NO_AGENT = "no-agent"
    OFF = "off"
    UNREACHABLE = "unreachable"


class Drops(msgspec.Struct, frozen=True):
    """Packets of a machine as the kernel's elements have counted them, which live a minute or so: those refused,
    new connections beyond the limit of an exemption, and those that only passed since the rule is observed.
    `sources` is how many addresses were concerned. `nobody`: the source is held as one of nobody, uncounted."""

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
    """An attachment: an address, or a prefix. `observed`: the reason is only observed. `drops` is None where the
    kernel did not say. `now` is what happens on this host (to a prefix: to what has no cached verdict)."""

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
    """What the agent, and those before it, have counted for the subscription since `started`, in packets. Those of
    the last `age` seconds may be missing."""

    started: datetime
    age: int
    refused: int
    beyond_limit: int


class Asked(msgspec.Struct, frozen=True):
    """A source that was asked about."""

    segment: str
    address: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a diagnosis is made from. `asked` is the source that was asked about, and then its machine,
    if any, comes first in `machines`; of a source of nobody, `now` and `outcome` say what happens to it, and
    `observed` whether its segment is only observed. `here` is what this host does to sources without a cached
    verdict, None if no machine's segment is an interface of it, and `places` says it for each segment; `stacked`
    is what takes packets of these segments before they are judged. `elsewhere` is who enforces here in place of an
    agent on this table. `behind` is what the store holds and the running agent has not taken in. `subscription` is
    None for a source of nobody, and where the records lack it: then `id` says whose it should be. `remembered` is
    for how many seconds the kernel counts what it drops."""

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
        """Where the exemption stands."""
        return state_of(self.exemption, self.at)

    @property
    def drops(self) -> Drops | None:
        """What was dropped of all machines together; None where that is not known of any."""
        known = [machine.drops for machine in self.machines if machine.drops is not None]
        return sum(known, Drops()) if known else None

    def reason_of_machines(self, preset: Preset) -> Reason:
        """What holds for the account's virtual machines, whatever their last start: a grant that needs one comes
        out as DENIED_RESTART_REQUIRED."""
        return rule(preset, self.subscription, self.exemption, Workload.VM, now=self.at).reason
