"""The configuration as a frozen value. Every key of portward.toml, its default and its bounds stand here and
nowhere else; `config.load` reads the file.

Only `segments` and `uplinks` have no default. A key that is not listed here is refused. Opens no file.
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


class Owned(StrEnum):
    """Whether the nftables table has an owner, so that no other program can change it: if the host can, or
    never."""

    AUTO = "auto"
    NEVER = "never"


class Ruleset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[ruleset]`: how the ruleset is loaded into the kernel."""

    owned: Owned = Owned.AUTO


class Metrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[metrics]`: the address that Prometheus scrapes (empty: none), and whether to count by subscription too."""

    address: str = "127.0.0.1:9125"
    subscriptions: bool = True


class Exemptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[exemptions]`: a command, with its arguments, that checks each request for review before a person decides,
    and how long it may take. Empty: no check."""

    check: tuple[str, ...] = ()
    check_seconds: Annotated[float, Meta(gt=0, le=600)] = 10.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration. `segments` and `uplinks` are interface names, which may end with a `*`."""

    segments: Annotated[tuple[str, ...], Meta(min_length=1)]
    uplinks: Annotated[tuple[str, ...], Meta(min_length=1)]
    store: str = DEFAULT_STORE
    table: Path = DEFAULT_TABLE
    preset: str = "azure-2020"
    mode: Mode = Mode.ENFORCE
    on_agent_down: OnAgentDown = OnAgentDown.CLOSED
    max_flip_share: Share = 0.1
    queue: Queue = Queue()
    verdicts: Verdicts = Verdicts()
    tunnels: Tunnels = Tunnels()
    ruleset: Ruleset = Ruleset()
    metrics: Metrics = Metrics()
    exemptions: Exemptions = Exemptions()

    def segment(self, interface: str) -> bool:
        """Whether an interface is a segment."""
        return matches(self.segments, interface)

    def uplink(self, interface: str) -> bool:
        """Whether an interface is an uplink."""
        return matches(self.uplinks, interface)

    def observes(self, interface: str) -> bool:
        """Whether a segment is only observed, by `mode` or by `verdicts.observe`."""
        return self.mode is Mode.OBSERVE or matches(self.verdicts.observe, interface)

    def metrics_endpoints(self) -> tuple[Endpoint, ...]:
        """The addresses that serve the metrics; empty if metrics are off. Raises ValueError if `metrics.address`
        is not valid."""
        return endpoint.parse(self.metrics.address) if self.metrics.address else ()
