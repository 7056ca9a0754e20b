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
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias
from zlib import crc32

from portward.base import resources
from portward.config.documents import network_text
from portward.config.keys import Config, Encrypted, OnAgentDown, Verdicts
from portward.dataplane import tunnels
from portward.dataplane.surroundings import NOTHING, Surroundings
from portward.ipc import mark
from portward.model import Mode, Network
from portward.policy.preset import Preset


class LimitResult(Enum):
    """What is counted of sources whose exemption carries a limit: packets within it, new connections beyond it."""

    WITHIN = auto()
    OVER = auto()


class NoVerdict(Enum):
    """Packets of a segment to a judged port that no verdict was found for, or none came back for."""

    DROPPED = auto()
    PASSED = auto()


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
VERDICT_SETS: Final[dict[mark.Class, str]] = {
    mark.Class.ALLOW: "allow",
    mark.Class.DENY: "deny",
    mark.Class.OBSERVED: "observed",
    mark.Class.REFUSED: "refused",
    mark.Class.UNKNOWN: "unknown",
}
# Sources with a limit → the limit's name, by family; and what such sources sent within it and beyond it.
RATE_LIMITS: Final = "rates"
# Interfaces that the policy table still takes for others: what they send is dropped.
UNSETTLED: Final = "unsettled"
# Interfaces, beside segments and uplinks, from which packets to judged ports pass: the agent has classified them.
KNOWN_INTERFACES: Final = "known_interfaces"
# Interfaces whose owner has changed in the last seconds: verdicts found before do not count.
RENEWED: Final = "renewed"
# Interfaces behind the gate, and the generation that the gate enforces; see `gate`.
GATED: Final = "gated"
ENFORCED: Final = "enforced"
# Packets acted on by a verdict that is not cached, by source and mark; by segment and mark beyond its size.
UNCACHED: Final = "uncached"
UNCACHED_SEGMENTS: Final = "uncached_segments"
LIMITED_SETS: Final = {LimitResult.WITHIN: "rated", LimitResult.OVER: "throttled"}
# What each element of these sets counts.
Verdict: TypeAlias = mark.Class | LimitResult | NoVerdict
COUNTED_SETS: Final[dict[Verdict, str]] = dict([*VERDICT_SETS.items(), *LIMITED_SETS.items()])

# What is counted by segment alone, since no subscription or no verdict stands behind it.
SEGMENT_SETS: Final[dict[Verdict, str]] = {
    mark.Class.UNKNOWN: "unknown_segments",
    NoVerdict.DROPPED: "unjudged_drops",
    NoVerdict.PASSED: "unjudged_passes",
}
# All sets whose elements count packets that no other set counts.
COUNTING_SETS: Final = frozenset(
    {f"{name}{family}" for name in (*COUNTED_SETS.values(), UNCACHED) for family in "46"}
    | {UNCACHED_SEGMENTS, *SEGMENT_SETS.values()}
) - {f"{VERDICT_SETS[mark.Class.UNKNOWN]}{family}" for family in "46"}

NO_INTERFACE: Final = "no interface"  # a name that no interface can have
# The committed rate of a segment may come at once for so many seconds.
_COMMITTED_BURST: Final = 4
# Hook (prerouting 0, input 1, forward 2) and priority of the base chains. These two in the order in which they
# must be registered: the kernel puts a newcomer before the chains of equal priority, so `screen` comes first and
# no chain of others between the two.
HOOKS: Final = {"learn": (0, -302), "screen": (0, -302)}
TUNNELS_HOOKS: Final = {"tunnels": (1, -302)}
# Loaded only if `Surroundings.guard`; in this order, too.
GUARD_HOOKS: Final = {"settled": (2, 2**31 - 1), "guard": (2, 2**31 - 1)}
# Lines that stand in the file between these words, and are loaded only if they are needed.
_GUARD: Final = "guard"
_KNOWN: Final = "known interfaces"
# Loaded only if `Surroundings.stacked`: the base chain of the file, and its other chains.
STACKED_HOOKS: Final = {"stacked": (2, -302)}
_STACKED: Final = ("stacked.nft", ("from_stacked", "stacked_mail"))
# What the shipped file says of the state of the policy table.
_ELEMENTS_OF_STATE: Final = re.compile(
    r"(?m) elements = \{ \$(?:CURRENT_EPOCH|SYNCED) \}|^define (?:CURRENT_EPOCH|SYNCED) = .*\n"
)
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
    # The base chains with hook and priority, in the order in which they are registered.
    hooks: Mapping[str, tuple[int, int]] = HOOKS | TUNNELS_HOOKS
    # The indexes of interfaces for the set KNOWN_INTERFACES. Not in `text`: nft looks each of them up among all
    # interfaces, which takes longer than everything else from some thousand on.
    known: frozenset[int] = frozenset()
    # The same as `text` in two parts: what does not depend on the state of the policy table, and the elements
    # that do, by set. Loading the same `fixed` again costs less.
    fixed: str = ""
    numbers: Mapping[str, tuple[int, ...]] = MappingProxyType({})

    @property
    def whole(self) -> str:
        """`text` with the known interfaces, for a table that is not there yet."""
        if not self.known:
            return self.text
        return f"{self.text}add element {FAMILY_TABLE} {KNOWN_INTERFACES} {_indexes(self.known)}\n"


def wanted(
    config: Config,
    preset: Preset,
    *,
    native: bool,
    state: State,
    surroundings: Surroundings = NOTHING,
) -> Wanted:
    """The ruleset for a configuration on a kernel with (`native`) or without nft_queue, in these surroundings."""
    text = _with_lines(resources.text("nftables", "portward.nft"), _GUARD, wanted=surroundings.guard)
    # While all segments are only observed nothing is refused, whatever it comes from.
    text = _with_lines(text, _KNOWN, wanted=not _observes_all(config))
    text = _with_literals(text, config, guard=surroundings.guard)
    definitions = _definitions(text)
    values = _values(config, preset, state) | _tunnels(config, surroundings)
    text = _with_values(text, values | {"DEFINITIONS": str(definitions)})
    if surroundings.stacked:
        text += _stacked(surroundings)
    statements = tuple(_statements(config))
    text += "".join(_probes(config.queue.workers))
    if native:
        text += "".join(map(_native, statements))
    fixed = _ELEMENTS_OF_STATE.sub("", text)
    text += f"add element {FAMILY_TABLE} coming {_coming(state.generation)}\n"
    if state.unsettled:
        text += f"add element {FAMILY_TABLE} {UNSETTLED} {_indexes(state.unsettled)}\n"
    hooks = HOOKS | TUNNELS_HOOKS
    hooks |= GUARD_HOOKS if surroundings.guard else {}
    hooks |= STACKED_HOOKS if surroundings.stacked else {}
    return Wanted(text, definitions, statements, native, hooks, surroundings.known, fixed, _numbers(state))


def read() -> None:
    """Reads the shipped files, which are kept from then on."""
    for name in ("portward.nft", _STACKED[0]):
        resources.text("nftables", name)


def stacked_alone(config: Config, preset: Preset, surroundings: Surroundings) -> str:
    """The chains for devices above segments alone, which the kernel takes sooner than the whole ruleset, and
    what they name of it."""
    whole = resources.text("nftables", "portward.nft")
    named = "".join(re.findall(r"(?m)^  (?:counter stacked|set internal[46]) .*\n", whole))
    named = re.sub(r" elements = \S+", "", named)
    return (
        f"define PORTS = {_set(preset.ports)}\ndefine SEGMENTS = {_interfaces(config.segments)}\n"
        f"table {FAMILY_TABLE} {{\n{named}}}\n{_stacked(surroundings)}"
    )


def _stacked(surroundings: Surroundings) -> str:
    name, _ = _STACKED
    return _with_values(resources.text("nftables", name), {"STACKED": _indexes(surroundings.stacked)})


def observed(config: Config) -> tuple[str, ...]:
    """The segment patterns that are only observed."""
    return config.segments if config.mode is Mode.OBSERVE else config.verdicts.observe


def opened(config: Config) -> tuple[str, ...]:
    """The segment patterns whose sources pass while no worker answers."""
    return config.segments if config.on_agent_down is OnAgentDown.OPEN else observed(config)


def _observes_all(config: Config) -> bool:
    """Whether every interface that one of the segment patterns can match is only observed."""
    return all(
        any(seen == one or (seen.endswith("*") and one.startswith(seen[:-1])) for seen in observed(config))
        for one in config.segments
    )


def replacement(
    want: Wanted,
    have_sets: Iterable[str],
    have_hooks: Mapping[str, tuple[int, int]],
    *,
    same_definitions: bool,
) -> str:
    """One transaction that puts `want` in place of what is loaded, and keeps what the kernel remembers."""
    return head(want, have_sets, have_hooks, same_definitions=same_definitions) + want.text


def head(
    want: Wanted,
    have_sets: Iterable[str],
    have_hooks: Mapping[str, tuple[int, int]],
    *,
    same_definitions: bool,
) -> str:
    """The commands that make room for `want`, in the same transaction, and keep what the kernel remembers: each
    line names nothing but a table, a chain or a set.

    `have_sets` are the sets of the table now, `have_hooks` its base chains, in the order in which they were made.
    These stay if they stand as they should: removing a hook drops every packet that waits in any queue of the
    namespace. The set of known interfaces stays too, and `Learned.know` brings it to `want.known` afterwards. What
    fills while it is loaded is made anew only where its definition differs.
    """
    have = set(have_sets)
    learned = {f"{name}{family}" for name in COUNTED_SETS.values() for family in "46"}
    rates = {f"{RATE_LIMITS}{family}" for family in "46"}
    learned |= {f"{UNCACHED}{family}" for family in "46"} | {UNCACHED_SEGMENTS, *SEGMENT_SETS.values()}
    learned |= {"miss_rate", "committed_rate", "share", "limited_segments"}
    learned |= {"reset_rate4", "reset_rate6", "reset_segments"}
    lines = [f"add table {FAMILY_TABLE}", f"flush table {FAMILY_TABLE}"]
    lines += [f"delete chain {FAMILY_TABLE} {name}" for name in _misplaced(have_hooks, want.hooks)]
    if STACKED_HOOKS.keys() & have_hooks.keys() - want.hooks.keys():
        # Made first, so that the removal does not fail if another process has removed one.
        lines += [f"{verb} chain {FAMILY_TABLE} {name}" for name in _STACKED[1] for verb in ("add", "delete")]
    lines += [
        f"flush set {FAMILY_TABLE} {name}"
        for name in (*FIXED_SETS, "epoch", "coming", "synced", ENFORCED, UNSETTLED, GATED)
        if name in have
    ]
    lines += [f"delete set {FAMILY_TABLE} {name}" for name in RETIRED_SETS if name in have]
    if not same_definitions:
        lines += [f"delete set {FAMILY_TABLE} {name}" for name in sorted(learned & have)]
        lines += [f"delete map {FAMILY_TABLE} {name}" for name in sorted(rates & have)]
    return "\n".join(lines) + "\n"


def _misplaced(have: Mapping[str, tuple[int, int]], want: Mapping[str, tuple[int, int]]) -> list[str]:
    """The base chains that must go: those at another place, and both of a pair that is not in its order."""
    kept = dict(want)
    for pair in (HOOKS, GUARD_HOOKS):
        if [(name, at) for name, at in have.items() if name in pair] != list(pair.items()):
            kept = {name: at for name, at in kept.items() if name not in pair}
    return [name for name, at in have.items() if kept.get(name) != at]


def _with_lines(text: str, name: str, *, wanted: bool) -> str:
    """Keeps the lines between `# NAME` and `# end of NAME`, or takes them out."""
    return re.sub(rf"(?ms)^ *# {name}$\n(.*?)^ *# end of {name}$\n", r"\1" if wanted else "", text)


def _values(config: Config, preset: Preset, state: State) -> dict[str, str]:
    internal = {*preset.internal, *_LOOPBACK}
    v4 = sorted(net for net in internal if isinstance(net, IPv4Network))
    v6 = sorted(net for net in internal if isinstance(net, IPv6Network))
    return {
        "PORTS": _set(preset.ports),
        "SEGMENTS": _interfaces(config.segments),
        "OBSERVED_SEGMENTS": _interfaces(observed(config)),
        "OPEN_SEGMENTS": _interfaces(opened(config)),
        "NOT_JUDGED": _interfaces(("lo", *config.uplinks)),
        "INTERNAL4": _set(map(network_text, _apart(v4))),
        "INTERNAL6": _set(map(network_text, _apart(v6))),
        "OCTETS4": _set(_first_octets(v4)),
        "OCTETS6": _set(_first_octets(v6)),
        "CURRENT_EPOCH": f"{mark.epoch_of(state.generation) << mark.EPOCH_SHIFT:#010x}",
        "SYNCED": str(_synced(state)),
    }


def _tunnels(config: Config, surroundings: Surroundings) -> dict[str, str]:
    """The protocols and UDP ports of tunnels that end here, which `chain tunnels` drops if they come from
    segments."""
    protocols = tunnels.PROTOCOLS
    ports = tunnels.DEFAULT_PORTS | surroundings.tunnel_ports | frozenset(config.tunnels.ports)
    if config.tunnels.encrypted is Encrypted.DROP:
        protocols |= tunnels.ENCRYPTED_PROTOCOLS
        ports |= tunnels.ENCRYPTED_PORTS | surroundings.encrypted_ports
    return {"TUNNELS": _set(sorted(protocols)), "TUNNEL_PORTS": _set(sorted(ports))}


def _numbers(state: State) -> dict[str, tuple[int, ...]]:
    """The elements of sets that say how the policy table stands."""
    epoch = mark.epoch_of(state.generation)
    return {
        "epoch": (epoch << mark.EPOCH_SHIFT,),
        "synced": (_synced(state),),
        "coming": tuple(one << mark.EPOCH_SHIFT for one in mark.coming(epoch)),
        UNSETTLED: tuple(sorted(state.unsettled)),
    }


def _synced(state: State) -> int:
    """Unless everything cached agrees with the table, a generation that is far from all that the table was at,
    or may reach before everything older is forgotten: whoever waits for one of these must not find it here."""
    return state.generation if state.synced else (state.generation + 2**31) % 2**32


def _coming(generation: int) -> str:
    epochs = mark.coming(mark.epoch_of(generation))
    return _set(f"{epoch << mark.EPOCH_SHIFT:#010x}" for epoch in epochs)


def _indexes(found: Iterable[int]) -> str:
    """Interface indexes as nft takes them whatever the interfaces are called. It takes a number for an interface
    of that name before it takes it for an index; 16 digits are too long for a name, and in quotes they stay 16."""
    return _set(f'"{index:016d}"' for index in sorted(found))


def _with_values(text: str, values: dict[str, str]) -> str:
    """Writes each `define NAME = …` of the values section anew."""
    head, rest = text.split("# values\n")
    section, tail = rest.split("# end of values\n")
    for name, value in values.items():
        section, count = re.subn(rf"(?m)^define {name} = .*$", f"define {name} = {value}", section)
        if count != 1:
            raise ValueError(f"portward.nft defines {name} {count} times among its values")
    return f"{head}# values\n{section}# end of values\n{tail}"


def _with_literals(text: str, config: Config, *, guard: bool) -> str:
    """Writes the numbers for which nft 1.0.6 takes no variable."""
    verdicts, queue = config.verdicts, config.queue
    asking = 2 if guard else 1  # `judge` and `guarded_source` have the same limits
    for pattern, value, times in (
        (r"(?<= set allow[46] )(.*timeout )\d+s", f"{verdicts.allow_seconds}s", 2),
        (r"(?<= set deny[46] )(.*timeout )\d+s", f"{verdicts.deny_seconds}s", 2),
        (r"(?<= set observed[46] )(.*timeout )\d+s", f"{verdicts.deny_seconds}s", 2),
        (r"(?<= set unknown[46] )(.*timeout )\d+s", f"{verdicts.unknown_seconds}s", 2),
        (r"( set (?:allow|deny|observed|refused)[46] .* size )\d+", str(verdicts.sources), 8),
        (r"( set unknown[46] .* size )\d+", str(verdicts.unknown_sources), 2),
        (r"(?<= set refused[46] )(.*timeout )\d+s", f"{verdicts.deny_seconds}s", 2),
        (r"(@miss_rate \{ iif limit rate over )\d+", str(queue.segment_rate), asking),
        (r"(@miss_rate .* burst )\d+", str(queue.segment_burst), asking),
        (r"(saddr limit rate over )\d+", str(queue.source_resets), 2),
        (r"(saddr limit .* burst )\d+", str(queue.source_resets), 2),
        (r"(@reset_segments \{ iif limit rate over )\d+", str(queue.segment_resets), 1),
        (r"(@reset_segments .* burst )\d+", str(queue.segment_resets), 1),
        (r"(\n    limit rate over )\d+(?=.* name held)", str(queue.resets), 1),
        (r"(\n    limit rate over .* burst )\d+(?=.* name held)", str(queue.resets), 1),
        # Beside them `refused` draws on the same bucket.
        (r"(iif limit rate )\d+(?=/second)", str(queue.segment_committed), asking + 1),
        (r"(iif limit rate \d+/second burst )\d+", str(_COMMITTED_BURST * queue.segment_committed), asking + 1),
        (r"(iif limit rate over )\d+(?=/minute)", str(_per_minute(verdicts)), 4),
        (r"(iif limit rate over \d+/minute burst )\d+", str(verdicts.segment_sources), 4),
        (r"(\n    limit rate over )\d+(?=.* name limited_all)", str(queue.rate), asking),
        (r"(\n    limit rate over .* burst )\d+(?=.* name limited_all)", str(queue.burst), asking),
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
    return _set(f'"{name}"' for name in uncovered(patterns) or [NO_INTERFACE])


def uncovered(patterns: Iterable[str]) -> list[str]:
    """The patterns without those that another one covers: an interval set of interface names refuses these."""
    patterns = tuple(patterns)
    wild = {pattern.removesuffix("*") for pattern in patterns if pattern.endswith("*")}
    return [
        pattern
        for pattern in dict.fromkeys(patterns)
        if not any(pattern.removesuffix("*").startswith(stem) and pattern != f"{stem}*" for stem in wild)
    ]


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
