"""The ruleset that the kernel should have: configuration, preset and surroundings → nft text. Pure.

The text is `rules/nftables/portward.nft` with the operator's values instead of the defaults in that file. The
queue statements follow it if the kernel has nft_queue. A value without a place in the file raises ValueError, so
file and code cannot drift apart unnoticed.

Read `wanted` first, then `head`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from types import MappingProxyType
from typing import Final, NamedTuple
from zlib import crc32

from portward.config.documents import network_text
from portward.config.keys import Config, Encrypted, OnAgentDown, Owned, Verdicts
from portward.dataplane import tunnels
from portward.dataplane.desired import NOTHING, Surroundings
from portward.dataplane.names import (
    BUCKET_SETS,
    COMING_EPOCHS,
    COUNTED_SETS,
    ENFORCED,
    EPOCH,
    FAMILY_TABLE,
    FIXED_SETS,
    GATED,
    GUARD_HOOKS,
    HOOKS,
    KNOWN_INTERFACES,
    MISS_LIMITED_SEGMENTS,
    NO_INTERFACE,
    RATE_LIMITS,
    RETIRED_SETS,
    SEGMENT_SETS,
    STACKED_HOOKS,
    SYNCED,
    TUNNELS_HOOKS,
    UNCACHED,
    UNCACHED_SEGMENTS,
    UNSETTLED,
)
from portward.ipc import mark
from portward.model import Mode, Network
from portward.policy.preset import Preset

# A segment may ask at once what its committed rate allows in this many seconds.
_COMMITTED_BURST_S: Final = 4
# A part of the file between `# NAME` and `# end of NAME` is loaded only if it is needed.
_GUARD: Final = "guard"
_KNOWN: Final = "known interfaces"
# The chains of stacked.nft that are no base chains.
_STACKED_CHAINS: Final = ("from_stacked", "stacked_mail")
# The lines of the file that depend on the state of the policy table.
_STATE_LINES: Final = re.compile(
    r"(?m) elements = \{ \$(?:CURRENT_EPOCH|SYNCED) \}|^define (?:CURRENT_EPOCH|SYNCED) = .*\n"
)
_LOOPBACK: Final = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


class Templates(NamedTuple):
    """The texts of portward.nft and stacked.nft as they are shipped."""

    portward: str
    stacked: str


class State(NamedTuple):
    """The state of the policy table when the ruleset is loaded. `synced`: all cached verdicts agree with this
    generation. `unsettled` are the indexes of interfaces that the table still takes for other interfaces."""

    generation: int
    synced: bool
    unsettled: frozenset[int] = frozenset()


class QueueStatement(NamedTuple):
    """The only statement of a chain. It sends a packet to one of `queues` queues, from number `first` on, by a
    hash of the addresses. A packet that finds no listener is dropped, or with `bypass` continues."""

    chain: str
    first: int
    queues: int
    bypass: bool = False


class Wanted(NamedTuple):
    """The ruleset that should be loaded. `text` holds its queue `statements` too if the kernel has nft_queue
    (`native`)."""

    text: str
    # A checksum of the definitions of the sets that packets fill. If it differs from the loaded one, these sets
    # are made anew.
    definitions: int
    statements: tuple[QueueStatement, ...]
    native: bool
    # The base chains with hook and priority, in the order of their registration.
    hooks: Mapping[str, tuple[int, int]] = HOOKS | TUNNELS_HOOKS
    # The indexes of interfaces for the set KNOWN_INTERFACES. They are not in `text`, because nft looks each one up
    # among all interfaces: with some thousand interfaces that takes longer than all the rest.
    known: frozenset[int] = frozenset()
    # `text` in two parts: the part that does not depend on the state of the policy table, and the elements that do
    # (set → marks or interface indexes). A text that was loaded before is loaded again faster.
    fixed: str = ""
    numbers: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    # The policy ports.
    ports: tuple[int, ...] = ()
    # Whether the table should have an owner if the host allows that. `text` is the same either way: see
    # `Nft.replace`.
    owned: bool = False

    @property
    def whole(self) -> str:
        """`text` with the known interfaces, for a table that is not there yet."""
        if not self.known:
            return self.text
        return f"{self.text}add element {FAMILY_TABLE} {KNOWN_INTERFACES} {_indexes(self.known)}\n"


def wanted(
    templates: Templates,
    config: Config,
    preset: Preset,
    *,
    native: bool,
    state: State,
    surroundings: Surroundings = NOTHING,
) -> Wanted:
    """The ruleset for a configuration on a kernel with (`native`) or without nft_queue, in these surroundings."""
    text = _with_part(templates.portward, _GUARD, wanted=surroundings.guard)
    # If all segments are only observed nothing is refused, whichever interface it comes from.
    text = _with_part(text, _KNOWN, wanted=not _observes_all(config))
    text = _with_literals(text, config, guard=surroundings.guard)
    definitions = _definitions(text)
    values = _values(config, preset, state) | _tunnels(config, surroundings)
    text = _with_values(text, values | {"DEFINITIONS": str(definitions)})
    if surroundings.stacked:
        text += _stacked(templates, surroundings)
    statements = tuple(_statements(config))
    text += "".join(_probes(config.queue.workers))
    if native:
        text += "".join(map(_native, statements))
    fixed = _STATE_LINES.sub("", text)
    text += f"add element {FAMILY_TABLE} {COMING_EPOCHS} {_coming(state.generation)}\n"
    if state.unsettled:
        text += f"add element {FAMILY_TABLE} {UNSETTLED} {_indexes(state.unsettled)}\n"
    hooks = HOOKS | TUNNELS_HOOKS
    hooks |= GUARD_HOOKS if surroundings.guard else {}
    hooks |= STACKED_HOOKS if surroundings.stacked else {}
    return Wanted(
        text, definitions, statements, native, hooks, surroundings.known, fixed, _numbers(state),
        ports=preset.ports, owned=config.ruleset.owned is Owned.AUTO,
    )  # fmt: skip


def elsewhere(text: str) -> str:
    """The ruleset `text` for a table of another name, to ask whether the kernel would take it."""
    return re.sub(rf"\b{FAMILY_TABLE}\b", f"{FAMILY_TABLE}_probe", text)


def stacked_alone(templates: Templates, config: Config, preset: Preset, surroundings: Surroundings) -> str:
    """The chains for devices on top of segments, with the sets and the counter that they name. The kernel loads
    them sooner than the whole ruleset."""
    named = "".join(re.findall(r"(?m)^  (?:counter stacked|set internal[46]) .*\n", templates.portward))
    named = re.sub(r" elements = \S+", "", named)
    return (
        f"define PORTS = {_set(preset.ports)}\ndefine SEGMENTS = {_interfaces(config.segments)}\n"
        f"table {FAMILY_TABLE} {{\n{named}}}\n{_stacked(templates, surroundings)}"
    )


def _stacked(templates: Templates, surroundings: Surroundings) -> str:
    return _with_values(templates.stacked, {"STACKED": _indexes(surroundings.stacked)})


def observed(config: Config) -> tuple[str, ...]:
    """The segment patterns that are only observed."""
    return config.segments if config.mode is Mode.OBSERVE else config.verdicts.observe


def opened(config: Config) -> tuple[str, ...]:
    """The segment patterns whose sources pass while no worker answers: all, or those that are only observed."""
    return config.segments if config.on_agent_down is OnAgentDown.OPEN else observed(config)


def _observes_all(config: Config) -> bool:
    """Whether each interface that a segment pattern can match is only observed."""
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
    """One transaction that replaces the loaded ruleset with `want`, and keeps the cached verdicts."""
    return head(want, have_sets, have_hooks, same_definitions=same_definitions) + want.text


def head(
    want: Wanted,
    have_sets: Iterable[str],
    have_hooks: Mapping[str, tuple[int, int]],
    *,
    same_definitions: bool,
) -> str:
    """The commands that make room for `want` in the same transaction, and keep the cached verdicts. Each line
    names only a table, a chain or a set.

    `have_sets` are the sets that the table has now, `have_hooks` its base chains in the order of their
    registration. A base chain stays if hook, priority and order are right, because removing a hook drops every
    packet that waits in any queue of the namespace. The set of known interfaces stays too, and
    `InterfaceSets.set_known` brings it to `want.known` afterwards. The sets that packets fill are made
    anew only if their definitions differ.
    """
    have = set(have_sets)
    lines = [f"add table {FAMILY_TABLE}", f"flush table {FAMILY_TABLE}"]
    lines += [f"delete chain {FAMILY_TABLE} {name}" for name in _misplaced(have_hooks, want.hooks)]
    if STACKED_HOOKS.keys() & have_hooks.keys() - want.hooks.keys():
        # Added first, so that the deletion does not fail if another process has deleted one.
        lines += [f"{verb} chain {FAMILY_TABLE} {name}" for name in _STACKED_CHAINS for verb in ("add", "delete")]
    lines += [f"flush set {FAMILY_TABLE} {name}" for name in _FLUSHED_SETS if name in have]
    lines += [f"delete set {FAMILY_TABLE} {name}" for name in RETIRED_SETS if name in have]
    if not same_definitions:
        lines += [f"delete set {FAMILY_TABLE} {name}" for name in sorted(_FILLED_SETS & have)]
        lines += [f"delete map {FAMILY_TABLE} {name}" for name in sorted(_FILLED_MAPS & have)]
    return "\n".join(lines) + "\n"


# The load gives these sets their elements anew.
_FLUSHED_SETS: Final = (*FIXED_SETS, EPOCH, COMING_EPOCHS, SYNCED, ENFORCED, UNSETTLED, GATED)
# Packets fill these sets, or the agent fills these maps, while they are loaded.
_FILLED_SETS: Final = frozenset(
    {f"{name}{family}" for name in (*COUNTED_SETS.values(), UNCACHED) for family in "46"}
    | {UNCACHED_SEGMENTS, *SEGMENT_SETS.values(), MISS_LIMITED_SEGMENTS, *BUCKET_SETS}
)
_FILLED_MAPS: Final = frozenset(f"{RATE_LIMITS}{family}" for family in "46")


def _misplaced(have: Mapping[str, tuple[int, int]], want: Mapping[str, tuple[int, int]]) -> list[str]:
    """The base chains that must be deleted: those with another hook or priority, and both chains of a pair in the
    wrong order."""
    kept = dict(want)
    for pair in (HOOKS, GUARD_HOOKS):
        if [(name, at) for name, at in have.items() if name in pair] != list(pair.items()):
            kept = {name: at for name, at in kept.items() if name not in pair}
    return [name for name, at in have.items() if kept.get(name) != at]


def _with_part(text: str, name: str, *, wanted: bool) -> str:
    """Keeps the lines between `# NAME` and `# end of NAME`, or deletes them."""
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
        "NOT_SCREENED": _interfaces(("lo", *config.uplinks)),
        "INTERNAL4": _set(map(network_text, _apart(v4))),
        "INTERNAL6": _set(map(network_text, _apart(v6))),
        "OCTETS4": _set(_first_octets(v4)),
        "OCTETS6": _set(_first_octets(v6)),
        "CURRENT_EPOCH": f"{mark.epoch_of(state.generation) << mark.EPOCH_SHIFT:#010x}",
        "SYNCED": str(_synced(state)),
    }


def _tunnels(config: Config, surroundings: Surroundings) -> dict[str, str]:
    """The protocols and UDP ports of tunnels that end on this host. `chain tunnels` drops their packets if these
    come from segments."""
    protocols = tunnels.PROTOCOLS
    ports = tunnels.DEFAULT_PORTS | surroundings.tunnel_ports | frozenset(config.tunnels.ports)
    if config.tunnels.encrypted is Encrypted.DROP:
        protocols |= tunnels.ENCRYPTED_PROTOCOLS
        ports |= tunnels.ENCRYPTED_PORTS | surroundings.encrypted_ports
    return {"TUNNELS": _set(sorted(protocols)), "TUNNEL_PORTS": _set(sorted(ports))}


def _numbers(state: State) -> dict[str, tuple[int, ...]]:
    """The elements of the sets that hold the state of the policy table."""
    epoch = mark.epoch_of(state.generation)
    return {
        EPOCH: (epoch << mark.EPOCH_SHIFT,),
        SYNCED: (_synced(state),),
        COMING_EPOCHS: tuple(one << mark.EPOCH_SHIFT for one in mark.coming(epoch)),
        UNSETTLED: tuple(sorted(state.unsettled)),
    }


def _synced(state: State) -> int:
    """The generation that all cached verdicts agree with. If they do not agree with the table yet, it is a
    generation half the number space away: a process that waits for a generation must not find it too early."""
    return state.generation if state.synced else (state.generation + 2**31) % 2**32


def _coming(generation: int) -> str:
    epochs = mark.coming(mark.epoch_of(generation))
    return _set(f"{epoch << mark.EPOCH_SHIFT:#010x}" for epoch in epochs)


def _indexes(found: Iterable[int]) -> str:
    """Interface indexes in a form that nft cannot mistake for names. nft reads a number as the name of an
    interface if there is one; 16 digits are too long for a name, and quotes keep the zeros."""
    return _set(f'"{index:016d}"' for index in sorted(found))


def _with_values(text: str, values: dict[str, str]) -> str:
    """Replaces the value of each `define NAME = …` in the section `values`."""
    head, rest = text.split("# values\n")
    section, tail = rest.split("# end of values\n")
    for name, value in values.items():
        section, count = re.subn(rf"(?m)^define {name} = .*$", f"define {name} = {value}", section)
        if count != 1:
            raise ValueError(f"the section `values` defines {name} {count} times, not once")
    return f"{head}# values\n{section}# end of values\n{tail}"


def _with_literals(text: str, config: Config, *, guard: bool) -> str:
    """Replaces the numbers for which nft 1.0.6 takes no variable. Raises ValueError if the file has another number
    of places for one of them."""
    verdicts, queue = config.verdicts, config.queue
    asking = 2 if guard else 1  # `classify` and `guarded_source` have the same limits
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
        # `refused` draws on the same bucket as well.
        (r"(iif limit rate )\d+(?=/second)", str(queue.segment_committed), asking + 1),
        (r"(iif limit rate \d+/second burst )\d+", str(_COMMITTED_BURST_S * queue.segment_committed), asking + 1),
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
    """How many verdicts of a segment may be cached per minute: its share once in the time that a verdict lives. So
    at most twice the share is cached."""
    return max(1, verdicts.segment_sources * 60 // max(verdicts.allow_seconds, verdicts.deny_seconds))


def _definitions(text: str) -> int:
    """A checksum of the lines that define the sets and maps that fill while the table is loaded."""
    return crc32("\n".join(re.findall(r"(?m)^ +(?:set \w+ \{.*dynamic|map ).*$", text)).encode())


def _statements(config: Config) -> Iterator[QueueStatement]:
    first, workers = config.queue.first, config.queue.workers
    yield QueueStatement("to_workers", first, workers)
    if config.on_agent_down is OnAgentDown.OPEN or observed(config):
        yield QueueStatement("to_workers_open", first, workers, bypass=True)
    for place in range(workers):
        yield QueueStatement(_chain_of(place), first + place, 1)


def _probes(workers: int) -> Iterator[str]:
    """The rules that send a query of the self-check to its worker, by the query's source port."""
    for place in range(workers):
        yield f"add chain {FAMILY_TABLE} {_chain_of(place)}\n"
        yield f"add rule {FAMILY_TABLE} probe tcp sport {place + 1} goto {_chain_of(place)}\n"


def _chain_of(place: int) -> str:
    return f"to_worker_{place + 1}"


def _native(statement: QueueStatement) -> str:
    # Without `fanout`, which would choose the queue by CPU instead of by the addresses.
    chain, first, queues, bypass = statement
    to = f"{first}-{first + queues - 1}" if queues > 1 else str(first)
    return f"add rule {FAMILY_TABLE} {chain} queue {'flags bypass ' if bypass else ''}to {to}\n"


def _interfaces(patterns: tuple[str, ...]) -> str:
    return _set(f'"{name}"' for name in uncovered(patterns) or [NO_INTERFACE])


def uncovered(patterns: Iterable[str]) -> list[str]:
    """The patterns without those that another pattern covers: an interval set refuses overlaps."""
    patterns = tuple(patterns)
    wild = {pattern.removesuffix("*") for pattern in patterns if pattern.endswith("*")}
    return [
        pattern
        for pattern in dict.fromkeys(patterns)
        if not any(pattern.removesuffix("*").startswith(stem) and pattern != f"{stem}*" for stem in wild)
    ]


def _apart(networks: list[IPv4Network] | list[IPv6Network]) -> list[Network]:
    """The networks, sorted and of one family, without those that another network covers."""
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
