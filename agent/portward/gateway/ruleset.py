"""What should be loaded: the text of the ruleset for a configuration. Pure but for reading the shipped files.

The text is `rules/nftables/portward.nft` with the operator's values in place of the defaults that stand in
it, and after it the queue statements where the kernel has nft_queue. A value that finds no place in the file
is an error, so file and code cannot drift apart unseen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum, auto
from ipaddress import IPv4Network, IPv6Network
from typing import Final, NamedTuple, TypeAlias
from zlib import crc32

from portward.config import Config, OnAgentDown, Verdicts
from portward.documents import network_text
from portward.gateway import mark
from portward.gateway.surroundings import NOTHING, Surroundings
from portward.model import Mode, Network
from portward.policy.preset import Preset
from portward.resources import rules


class Rated(Enum):
    """What is counted of sources whose exemption carries a limit: packets within it, new connections beyond it."""

    WITHIN = auto()
    BEYOND = auto()


TABLE: Final = "portward"
FAMILY_TABLE: Final = "inet portward"

# Sets whose elements the ruleset text names and nothing changes while it is loaded.
FIXED_SETS: Final = (
    "definitions", "observed_segments", "open_segments",
    "internal4", "internal6", "octets4", "octets6",
)  # fmt: skip
# Sets of older rulesets, which this one has no use for.
RETIRED_SETS: Final = ("segments",)
# Sets that packets fill, by class, without the family's digit.
LEARNED_SETS: Final[dict[mark.Class, str]] = {
    mark.Class.ALLOW: "allow",
    mark.Class.DENY: "deny",
    mark.Class.OBSERVED: "observed",
    mark.Class.REFUSED: "refused",
    mark.Class.UNKNOWN: "unknown",
}
# Sources with a limit → the limit's name, by family; and what such sources sent within it and beyond it.
RATES: Final = "rates"
# Interfaces that the policy table still takes for others: what they send is dropped.
UNSETTLED: Final = "unsettled"
# Interfaces behind the gate, and the generation that the gate enforces; see `gate`.
GATED: Final = "gated"
ENFORCED: Final = "enforced"
RATED_SETS: Final = {Rated.WITHIN: "rated", Rated.BEYOND: "throttled"}
# What each element of these sets counts.
Verdict: TypeAlias = mark.Class | Rated
COUNTED_SETS: Final[dict[Verdict, str]] = dict([*LEARNED_SETS.items(), *RATED_SETS.items()])
COUNTERS: Final = (
    "internal", "missed", "answered", "answered_stale", "unlearned", "limited", "limited_all", "stale",
    "unjudged", "unjudged_open", "headers", "unknown", "unsettled", "throttled", "held",
)  # fmt: skip

_NO_INTERFACE: Final = "no interface"  # a name that no interface can have
# The committed rate of a segment may come at once for so many seconds.
_COMMITTED_BURST: Final = 4
# The base chains, with hook (prerouting) and priority: side by side, so that no chain of others is between them.
_HOOKS: Final = {"screen": (0, -302), "learn": (0, -301)}
_LOOPBACK: Final = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


class State(NamedTuple):
    """What the ruleset says of the policy table when it is loaded. `unsettled` are the indexes of interfaces
    that the table still takes for others."""

    generation: int
    synced: bool  # what the kernel remembers agrees with it
    unsettled: frozenset[int] = frozenset()


class QueueStatement(NamedTuple):
    """The one statement of a chain: to one of `queues` queues from `first` on, by a hash of the addresses; with
    `bypass` what finds no listener goes on instead of being dropped."""

    chain: str
    first: int
    queues: int
    bypass: bool = False


class Wanted(NamedTuple):
    """The ruleset that should be loaded. `statements` are those of its chains for the queue, which stand in
    `text` too where the kernel has nft_queue (`native`)."""

    text: str
    definitions: int  # checksum of the definitions of the learned sets: where it differs, they are made anew
    statements: tuple[QueueStatement, ...]
    native: bool


def wanted(
    config: Config,
    preset: Preset,
    *,
    native: bool,
    state: State,
    surroundings: Surroundings = NOTHING,
) -> Wanted:
    """The ruleset for a configuration on a kernel with (`native`) or without nft_queue, in these surroundings."""
    text = _with_literals(rules("nftables", "portward.nft").read_text(), config)
    definitions = _definitions(text)
    text = _with_values(text, _values(config, preset, state) | {"DEFINITIONS": str(definitions)})
    statements = tuple(_statements(config))
    text += "".join(_probes(config.queue.workers))
    if native:
        text += "".join(map(_native, statements))
    if state.unsettled:
        indexes = ", ".join(map(str, sorted(state.unsettled)))
        text += f"add element {FAMILY_TABLE} {UNSETTLED} {{ {indexes} }}\n"
    return Wanted(text, definitions, statements, native)


def observed(config: Config) -> tuple[str, ...]:
    """The segment patterns that are only observed."""
    return config.segments if config.mode is Mode.OBSERVE else config.verdicts.observe


def replacement(
    want: Wanted,
    have_sets: Iterable[str],
    have_hooks: Mapping[str, tuple[int, int]],
    *,
    same_definitions: bool,
) -> str:
    """One transaction that puts `want` in place of what is loaded, and keeps what the kernel remembers.

    `have_sets` are the sets of the table now, `have_hooks` its base chains. These stay where they stand as they
    should: removing a hook drops every packet that waits in any queue of the namespace. What fills while it is
    loaded is made anew only where its definition differs.
    """
    have = set(have_sets)
    learned = {f"{name}{family}" for name in COUNTED_SETS.values() for family in "46"}
    rates = {f"{RATES}{family}" for family in "46"}
    learned |= {"miss_rate", "committed_rate", "share", "limited_segments"}
    lines = [f"add table {FAMILY_TABLE}", f"flush table {FAMILY_TABLE}"]
    lines += [f"delete chain {FAMILY_TABLE} {name}" for name, at in have_hooks.items() if _HOOKS.get(name) != at]
    lines += [
        f"flush set {FAMILY_TABLE} {name}"
        for name in (*FIXED_SETS, "epoch", "synced", ENFORCED, UNSETTLED, GATED)
        if name in have
    ]
    lines += [f"delete set {FAMILY_TABLE} {name}" for name in RETIRED_SETS if name in have]
    if not same_definitions:
        lines += [f"delete set {FAMILY_TABLE} {name}" for name in sorted(learned & have)]
        lines += [f"delete map {FAMILY_TABLE} {name}" for name in sorted(rates & have)]
    return "\n".join(lines) + "\n" + want.text


def _values(config: Config, preset: Preset, state: State) -> dict[str, str]:
    internal = {*preset.internal, *_LOOPBACK}
    v4 = sorted(net for net in internal if isinstance(net, IPv4Network))
    v6 = sorted(net for net in internal if isinstance(net, IPv6Network))
    opens = config.segments if config.on_agent_down is OnAgentDown.OPEN else observed(config)
    return {
        "PORTS": _set(preset.ports),
        "SEGMENTS": _interfaces(config.segments),
        "OBSERVED_SEGMENTS": _interfaces(observed(config)),
        "OPEN_SEGMENTS": _interfaces(opens),
        "INTERNAL4": _set(map(network_text, _apart(v4))),
        "INTERNAL6": _set(map(network_text, _apart(v6))),
        "OCTETS4": _set(_first_octets(v4)),
        "OCTETS6": _set(_first_octets(v6)),
        "CURRENT_EPOCH": f"{mark.epoch_of(state.generation) << mark.EPOCH_SHIFT:#010x}",
        "SYNCED": str(state.generation if state.synced else state.generation ^ 1),
    }


def _with_values(text: str, values: dict[str, str]) -> str:
    """Writes each `define NAME = …` of the values section anew."""
    head, rest = text.split("# values\n")
    section, tail = rest.split("# end of values\n")
    for name, value in values.items():
        section, count = re.subn(rf"(?m)^define {name} = .*$", f"define {name} = {value}", section)
        if count != 1:
            raise ValueError(f"portward.nft defines {name} {count} times among its values")
    return f"{head}# values\n{section}# end of values\n{tail}"


def _with_literals(text: str, config: Config) -> str:
    """Writes the numbers for which nft 1.0.6 takes no variable."""
    verdicts, queue = config.verdicts, config.queue
    for pattern, value, times in (
        (r"(?<= set allow[46] )(.*timeout )\d+s", f"{verdicts.allow_seconds}s", 2),
        (r"(?<= set deny[46] )(.*timeout )\d+s", f"{verdicts.deny_seconds}s", 2),
        (r"(?<= set observed[46] )(.*timeout )\d+s", f"{verdicts.deny_seconds}s", 2),
        (r"(?<= set unknown[46] )(.*timeout )\d+s", f"{verdicts.unknown_seconds}s", 2),
        (r"( set (?:allow|deny|observed|refused)[46] .* size )\d+", str(verdicts.sources), 8),
        (r"( set unknown[46] .* size )\d+", str(verdicts.unknown_sources), 2),
        (r"(iif limit rate over )\d+(?=/second)", str(queue.segment_rate), 1),
        (rf"(iif limit rate over {queue.segment_rate}/second burst )\d+", str(queue.segment_burst), 1),
        (r"(iif limit rate )\d+(?=/second)", str(queue.segment_committed), 1),
        (r"(iif limit rate \d+/second burst )\d+", str(_COMMITTED_BURST * queue.segment_committed), 1),
        (r"(iif limit rate over )\d+(?=/minute)", str(_per_minute(verdicts)), 3),
        (r"(iif limit rate over \d+/minute burst )\d+", str(verdicts.segment_sources), 3),
        (r"(\n    limit rate over )\d+", str(queue.rate), 1),
        (rf"(\n    limit rate over {queue.rate}/second burst )\d+", str(queue.burst), 1),
    ):
        text, count = re.subn(pattern, rf"\g<1>{value}", text)
        if count != times:
            raise ValueError(f"portward.nft has {count} places for {pattern}, not {times}")
    return text


def _per_minute(verdicts: Verdicts) -> int:
    """How many verdicts a minute a segment may have remembered: its share once in the time that they live. So at
    most twice the share is alive."""
    return max(1, verdicts.segment_sources * 60 // max(verdicts.allow_seconds, verdicts.deny_seconds))


def _definitions(text: str) -> int:
    """A checksum of the lines that define the sets that fill while the table is loaded."""
    return crc32("\n".join(re.findall(r"(?m)^ +(?:set \w+ \{.*dynamic|map ).*$", text)).encode())


def _statements(config: Config) -> Iterator[QueueStatement]:
    first, workers = config.queue.first, config.queue.workers
    yield QueueStatement("to_workers", first, workers)
    if config.on_agent_down is OnAgentDown.OPEN or observed(config):
        yield QueueStatement("to_workers_open", first, workers, bypass=True)
    for place in range(workers):
        yield QueueStatement(_chain_of(place), first + place, 1)


def _probes(workers: int) -> Iterator[str]:
    """The rules that bring a query of the self-check to the worker that it asks, by the query's source port."""
    for place in range(workers):
        yield f"add chain {FAMILY_TABLE} {_chain_of(place)}\n"
        yield f"add rule {FAMILY_TABLE} probe tcp sport {place + 1} goto {_chain_of(place)}\n"


def _chain_of(place: int) -> str:
    return f"to_worker_{place + 1}"


def _native(statement: QueueStatement) -> str:
    # `fanout` is not used: it picks the queue by CPU.
    chain, first, queues, bypass = statement
    to = f"{first}-{first + queues - 1}" if queues > 1 else str(first)
    return f"add rule {FAMILY_TABLE} {chain} queue {'flags bypass ' if bypass else ''}to {to}\n"


def _interfaces(patterns: tuple[str, ...]) -> str:
    """An interval set of interface names refuses a name that another's wildcard covers: those go."""
    wild = {pattern.removesuffix("*") for pattern in patterns if pattern.endswith("*")}
    kept = [
        pattern
        for pattern in dict.fromkeys(patterns)
        if not any(pattern.removesuffix("*").startswith(stem) and pattern != f"{stem}*" for stem in wild)
    ]
    return _set(f'"{name}"' for name in kept or [_NO_INTERFACE])


def _apart(networks: list[IPv4Network] | list[IPv6Network]) -> list[Network]:
    """The networks without those that others cover."""
    kept: list[Network] = []
    for network in networks:
        if not (kept and network.subnet_of(kept[-1])):  # type: ignore[arg-type] # of one family, sorted
            kept.append(network)
    return kept


def _first_octets(networks: Iterable[Network]) -> list[int]:
    """The first octets of all addresses in the networks."""
    return sorted(
        {
            octet
            for network in networks
            for octet in range(network.network_address.packed[0], network.broadcast_address.packed[0] + 1)
        }
    )


def _set(elements: Iterable[object]) -> str:
    return "{ " + ", ".join(map(str, elements)) + " }"
