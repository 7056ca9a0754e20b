"""The configuration as a frozen value. Every key of portward.toml, its default and its bounds stand here and
nowhere else; `config.load` reads the file.

Only `uplinks` has no default, and `segments` or `groups` must name an interface. A key that is not listed here is
refused. Opens no file.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from portward.base.interfaces import matches
from portward.config import endpoint
from portward.config.endpoint import Endpoint
from portward.config.store_url import DEFAULT_STORE
from portward.model import Mode

DEFAULT_PATH: Final = Path("/etc/portward/portward.toml")
DEFAULT_TABLE: Final = Path("/var/cache/portward")

_LAST_PORT: Final = 65_535

Seconds = Annotated[int, Meta(ge=1, le=86_400)]
Rate = Annotated[int, Meta(ge=1, le=10_000_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
Size = Annotated[int, Meta(ge=16, le=4_194_304)]


class OnAgentDown(StrEnum):
    """The verdict on unknown sources while no agent runs: dropped, or passed."""

    CLOSED = "closed"
    OPEN = "open"


class Refusal(StrEnum):
    """The answer to a denied packet: none, or a TCP reset."""

    DROP = "drop"
    REJECT = "reject"


class QueueReader(StrEnum):
    """How a worker reads its queue: many packets at a time on its own socket, or one by one through the library
    NetfilterQueue."""

    BATCH = "batch"
    NETFILTERQUEUE = "netfilterqueue"


class Queue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[queue]`: how packets of sources without a cached verdict reach the workers. Rates are in packets a second.
    The rates of resets limit the answers to a rejected source after its first packet."""

    first: Annotated[int, Meta(ge=0, le=65_535)] = 0
    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    length: Annotated[int, Meta(ge=1, le=65_536)] = 4_096
    reader: QueueReader = QueueReader.BATCH
    segment_rate: Rate = 5_000
    segment_burst: Rate = 1_000
    segment_committed: Rate = 50
    rate: Rate = 20_000
    burst: Rate = 4_000
    source_resets: Rate = 50
    segment_resets: Rate = 500
    resets: Rate = 1_000


class Verdicts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[verdicts]`: how a source is refused, which segments are only observed, and how many verdicts the kernel
    caches for how long."""

    refuse_with: Refusal = Refusal.DROP
    observe: tuple[str, ...] = ()
    allow_seconds: Seconds = 60
    deny_seconds: Seconds = 60
    unknown_seconds: Seconds = 10
    sources: Size = 262_144
    segment_sources: Size = 8_192
    unknown_sources: Size = 16_384


class Encrypted(StrEnum):
    """The verdict on encrypted tunnels from segments to this host: passed, or dropped."""

    PASS = "pass"  # noqa: S105 # no password
    DROP = "drop"


class Tunnels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tunnels]`: packets from segments to tunnels that end on this host. Tunnel protocols that do not
    authenticate the sender are always dropped. `ports` are more UDP ports of such tunnels. `encrypted` is the
    verdict on IPsec and WireGuard, which do."""

    encrypted: Encrypted = Encrypted.PASS
    ports: tuple[Annotated[int, Meta(ge=1, le=_LAST_PORT)], ...] = ()


class UnknownFrames(StrEnum):
    """The verdict on frames from bridged segments that carry neither ARP nor an IP packet in its right form:
    dropped, or passed."""

    DROP = "drop"
    PASS = "pass"  # noqa: S105 # no password


class Bridge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[bridge]`: frames from segments that are ports of a bridge of this host. The bridge forwards frames of any
    kind, and portward sees a packet to a policy port only in a frame that carries IP."""

    unknown_frames: UnknownFrames = UnknownFrames.DROP


class Metrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[metrics]`: the address that Prometheus scrapes (empty: none), and whether to count by subscription too."""

    address: str = "127.0.0.1:9125"
    subscriptions: bool = True


class Exemptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[exemptions]`: a command, with its arguments, that checks each request for review before a person decides,
    and how long it may take. Empty: no check."""

    check: tuple[str, ...] = ()
    check_seconds: Annotated[float, Meta(gt=0, le=600)] = 10.0


class InterfaceGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[groups]]`: one segment behind many interfaces, which are `interfaces` as in `Config.segments`. Records
    and verbs name the group. The kernel caches by interface."""

    name: str
    interfaces: Annotated[tuple[str, ...], Meta(min_length=1)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration. `segments` and `uplinks` are interface names, which may end with a `*`.

    No interface can match two groups, or a group and `segments`, and no interface but a group's own can have the
    group's name: `load` refuses such a configuration. So a name means one segment, in whatever place it stands.
    """

    segments: tuple[str, ...] = ()
    uplinks: Annotated[tuple[str, ...], Meta(min_length=1)]
    groups: tuple[InterfaceGroup, ...] = ()
    store: str = DEFAULT_STORE
    table: Path = DEFAULT_TABLE
    preset: str = "azure-2020"
    mode: Mode = Mode.ENFORCE
    on_agent_down: OnAgentDown = OnAgentDown.CLOSED
    max_flip_share: Share = 0.1
    queue: Queue = Queue()
    verdicts: Verdicts = Verdicts()
    tunnels: Tunnels = Tunnels()
    bridge: Bridge = Bridge()
    metrics: Metrics = Metrics()
    exemptions: Exemptions = Exemptions()

    def patterns(self) -> tuple[str, ...]:
        """The patterns of all tenant-facing interfaces: `segments`, and those of the groups."""
        return (*self.segments, *(pattern for group in self.groups for pattern in group.interfaces))

    def segments_in_words(self) -> str:
        """The segments as the configuration has them: `vni*, tap0, group calico (cali*)`."""
        groups = (f"group {group.name} ({', '.join(group.interfaces)})" for group in self.groups)
        return ", ".join((*self.segments, *groups))

    def segment(self, interface: str) -> bool:
        """Whether an interface is a segment, or belongs to a group."""
        return matches(self.segments, interface) or self.group_of(interface) is not None

    def segment_of(self, interface: str) -> str | None:
        """The name of the segment behind an interface: its group's, or its own; None if it faces no tenant."""
        if (group := self.group_of(interface)) is not None:
            return group.name
        return interface if matches(self.segments, interface) else None

    def group_named(self, name: str) -> InterfaceGroup | None:
        """The group with this name."""
        return next((group for group in self.groups if group.name == name), None)

    def group_of(self, interface: str) -> InterfaceGroup | None:
        """The group that an interface belongs to."""
        return next((group for group in self.groups if matches(group.interfaces, interface)), None)

    def uplink(self, interface: str) -> bool:
        """Whether an interface is an uplink."""
        return matches(self.uplinks, interface)

    def observes(self, name: str) -> bool:
        """Whether a segment, or the segment behind an interface, is only observed, by `mode` or by
        `verdicts.observe`. A group is observed as a whole."""
        if self.mode is Mode.OBSERVE:
            return True
        group = self.group_named(name) or self.group_of(name)
        return matches(self.verdicts.observe, name) if group is None else group.name in self.verdicts.observe

    def metrics_endpoints(self) -> tuple[Endpoint, ...]:
        """The addresses that serve the metrics; empty if metrics are off. Raises ValueError if `metrics.address`
        is not valid."""
        return endpoint.parse(self.metrics.address) if self.metrics.address else ()
