"""portward.toml → one frozen value. Every key, its default and its bounds stand here and nowhere else.

Only `segments` and `uplinks` have no default. A key that is not listed here is refused. Paths are relative to the
folder of the file (see `paths`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from portward.base.interfaces import is_pattern
from portward.base.interfaces import matches as matches  # noqa: PLC0414 # the readers of a configuration ask here
from portward.config import endpoint, paths
from portward.config.endpoint import Endpoint
from portward.config.files import mistake, read_toml
from portward.errors import together
from portward.model import Mode

DEFAULT_PATH: Final = Path("/etc/portward/portward.toml")
DEFAULT_TABLE: Final = Path("/var/cache/portward")

# The URL of a store that there is a backend for; its path.
STORE: Final = re.compile(r"sqlite:(.+)", re.DOTALL)
# Queue numbers have 16 bits.
_QUEUES: Final = 65_536
_LAST_PORT: Final = 65_535

Seconds = Annotated[int, Meta(ge=1, le=86_400)]
Rate = Annotated[int, Meta(ge=1, le=10_000_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
Size = Annotated[int, Meta(ge=16, le=4_194_304)]


class OnAgentDown(StrEnum):
    """What becomes of unknown sources while no agent runs: dropped, or let pass."""

    CLOSED = "closed"
    OPEN = "open"


class Refusal(StrEnum):
    """How a denied packet is answered: not at all, or with a TCP reset."""

    DROP = "drop"
    REJECT = "reject"


class QueueReader(StrEnum):
    """How a worker reads its queue: many packets at a time on a socket of its own, or one by one through
    NetfilterQueue."""

    BATCH = "batch"
    NETFILTERQUEUE = "netfilterqueue"


class Queue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[queue]`: the way of unremembered sources to the workers. Rates are in packets a second; those of resets
    are what rejected sources are answered beyond their first packet."""

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
    """`[verdicts]`: how a source is refused, what is only observed, and what the kernel remembers how long."""

    refuse_with: Refusal = Refusal.DROP
    observe: tuple[str, ...] = ()
    allow_seconds: Seconds = 60
    deny_seconds: Seconds = 60
    unknown_seconds: Seconds = 10
    sources: Size = 262_144
    segment_sources: Size = 8_192
    unknown_sources: Size = 16_384


class Encrypted(StrEnum):
    """What becomes of encrypted tunnels from segments to this host: let through, or dropped."""

    PASS = "pass"  # noqa: S105 # no password
    DROP = "drop"


class Tunnels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tunnels]`: packets from segments to tunnels that end on this host. Those of protocols without a proof of
    the sender are always dropped; `ports` are further UDP ports of such tunnels, `encrypted` says what becomes of
    IPsec and WireGuard."""

    encrypted: Encrypted = Encrypted.PASS
    ports: tuple[Annotated[int, Meta(ge=1, le=_LAST_PORT)], ...] = ()


class Metrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[metrics]`: where Prometheus scrapes (empty: nowhere), and whether by subscription too."""

    address: str = "127.0.0.1:9125"
    subscriptions: bool = True


class Exemptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[exemptions]`: a command, with its arguments, that is asked about each request for review before a person
    is, and the seconds that it may take. Empty: none is asked."""

    check: tuple[str, ...] = ()
    check_seconds: Annotated[float, Meta(gt=0, le=600)] = 10.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration. `segments` and `uplinks` are interface names, `*` allowed at their end."""

    segments: Annotated[tuple[str, ...], Meta(min_length=1)]
    uplinks: Annotated[tuple[str, ...], Meta(min_length=1)]
    store: str = "sqlite:/var/lib/portward/portward.db"
    table: Path = DEFAULT_TABLE
    preset: str = "azure-2020"
    mode: Mode = Mode.ENFORCE
    on_agent_down: OnAgentDown = OnAgentDown.CLOSED
    max_flip_share: Share = 0.1
    queue: Queue = Queue()
    verdicts: Verdicts = Verdicts()
    tunnels: Tunnels = Tunnels()
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
        """Where the metrics are served; empty if they are switched off. Raises ValueError for what is no
        address."""
        return endpoint.parse(self.metrics.address) if self.metrics.address else ()


def load(path: Path) -> Config:
    """Reads portward.toml, and gives it with all paths absolute; raises InputError with file, line, field and what
    would be right."""
    config = read_toml(path, Config)
    if found := [mistake(path, problem, *steps) for problem, steps in _problems(config)]:
        raise together(found)
    return located(config, path)


def located(config: Config, file: Path) -> Config:
    """The configuration with the paths in it as `paths` has it."""
    check = config.exemptions.check
    command = (paths.program(check[0], file), *(os.fsdecode(word.encode()) for word in check[1:])) if check else ()
    return replace(
        config,
        store=STORE.sub(lambda found: f"sqlite:{paths.from_file(found[1], file)}", config.store),
        table=Path(paths.from_file(str(config.table), file)),
        preset=paths.from_file(config.preset, file) if paths.is_path(config.preset) else config.preset,
        exemptions=replace(config.exemptions, check=command),
    )


def _problems(config: Config) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """What is wrong beyond types and bounds: what would be right, and the steps to the field."""
    lists: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
        (("segments",), config.segments),
        (("uplinks",), config.uplinks),
        (("verdicts", "observe"), config.verdicts.observe),
    )
    for steps, patterns in lists:
        for place, pattern in enumerate(patterns):
            if not is_pattern(pattern):
                yield (
                    f"{pattern!r} is no interface name: up to 15 bytes without space, "
                    "'/', ':', '%', '\"' or '\\', a '*' only at its end and not alone",
                    (*steps, place),
                )
    # One that is wrong in itself would make others look wrong that are not.
    if all(is_pattern(pattern) for _, patterns in lists for pattern in patterns):
        yield from _overlaps(config)
    try:
        config.metrics_endpoints()
    except ValueError as error:
        yield str(error), ("metrics", "address")
    if problem := _store_problem(config.store):
        yield problem, ("store",)
    if config.table == Path():  # so is ""
        yield "names no folder of its own", ("table",)
    if config.exemptions.check and not config.exemptions.check[0]:
        yield "names no program: its path comes first, then its arguments", ("exemptions", "check", 0)
    if config.queue.first + config.queue.workers > _QUEUES:
        yield f"the last queue must not be beyond {_QUEUES - 1}", ("queue", "workers")


def _store_problem(url: str) -> str:
    """What is wrong with the URL of a store; empty if nothing is."""
    found = STORE.fullmatch(url)
    path = found[1].lstrip("/") if found else ""
    if found is None or not path:
        return f"{url!r} is no store that this version knows: sqlite:PATH"
    # In a URL a host would follow. As a path it would be /x on Linux, which is not what `sqlite://x` looks like.
    if found[1].startswith("//") and not found[1].startswith("///"):
        return (
            f"{url!r} has two slashes, after which a URL has a host: 'sqlite:{path}' is a file beside this one, "
            f"'sqlite:/{path}' one in /"
        )
    return ""


def _overlaps(config: Config) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """What is wrong with the lists of interfaces together."""
    for place, uplink in enumerate(config.uplinks):
        if any(_overlap(uplink, segment) for segment in config.segments):
            yield f"{uplink!r} is also a segment: mail that comes in would be judged", ("uplinks", place)
    for place, pattern in enumerate(config.verdicts.observe):
        if not any(_overlap(pattern, segment) for segment in config.segments):
            yield f"{pattern!r} is none of the segments", ("verdicts", "observe", place)


def _overlap(one: str, other: str) -> bool:
    """Whether some name matches both patterns."""
    stems = one.removesuffix("*"), other.removesuffix("*")
    if one.endswith("*") and other.endswith("*"):
        return stems[0].startswith(stems[1]) or stems[1].startswith(stems[0])
    return matches((one,), stems[1]) if one.endswith("*") else matches((other,), one)
