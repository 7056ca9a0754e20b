"""The ruleset that the kernel should have: configuration, preset and surroundings → nft text. Pure.

The text is `rules/nftables/portward.nft` with the operator's values instead of the defaults in that file. The
queue statements follow it if the kernel has nft_queue. A value without a place in the file raises ValueError, so
file and code cannot drift apart unnoticed. The table `bridge` has the same text with other words, and bridge.nft
behind it.

Read `wanted` first, then `head`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from types import MappingProxyType
from typing import Final, NamedTuple
from zlib import crc32

from portward.base.interfaces import covers
from portward.config.documents import network_text
from portward.config.keys import Config, Encrypted, OnAgentDown, UnknownFrames, Verdicts
from portward.dataplane import queue_rules, tunnels
from portward.dataplane.bridgetext import for_bridge
from portward.dataplane.desired import NOTHING, Desired, Surroundings
from portward.dataplane.names import (
    BUCKET_SETS,
    COMING_EPOCHS,
    COUNTED_SETS,
    ENFORCED,
    EPOCH,
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
    KernelTable,
)
from portward.dataplane.queue_rules import QueueStatement
from portward.ipc import mark
from portward.model import Mode, Network
from portward.policy.preset import Preset

# A segment may ask at once what its committed rate allows in this many seconds.
_COMMITTED_BURST_S: Final = 4
# A part of the file between `# NAME` and `# end of NAME` is loaded only if it is needed.
_GUARD: Final = "guard"
_KNOWN: Final = "known interfaces"
_ROUTED: Final = "routed"
# The chains of stacked.nft that are no base chains.
_STACKED_CHAINS: Final = ("from_stacked", "stacked_mail")
# The lines of the file that depend on the state of the policy table.
_STATE_LINES: Final = re.compile(
    r"(?m) elements = \{ \$(?:CURRENT_EPOCH|SYNCED) \}|^define (?:CURRENT_EPOCH|SYNCED) = .*\n"
)
_LOOPBACK: Final = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


class Templates(NamedTuple):
    """The texts of portward.nft, stacked.nft and bridge.nft as they are shipped."""

    portward: str
    stacked: str
    bridge: str


class State(NamedTuple):
    """The state of the policy table when the ruleset is loaded. `synced`: all cached verdicts agree with this
    generation. `unsettled` are the indexes of interfaces that the table still takes for other interfaces."""

    generation: int
    synced: bool
    unsettled: frozenset[int] = frozenset()


class Wanted(NamedTuple):
    """The ruleset that should be loaded. `text` holds its queue `statements` too if the kernel has nft_queue
    (`native`)."""

    table: KernelTable
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

    @property
    def whole(self) -> str:
        """`text` with the known interfaces, for a table that is not there yet."""
        if not self.known:
            return self.text
        return f"{self.text}add element {self.table} {KNOWN_INTERFACES} {_indexes(self.known)}\n"


def wanted(
    templates: Templates,
    config: Config,
    preset: Preset,
    *,
    native: bool,
    state: State,
    surroundings: Surroundings = NOTHING,
    table: KernelTable = KernelTable.INET,
) -> Wanted:
    """The ruleset of a table for a configuration on a kernel with (`native`) or without nft_queue, in these
    surroundings: for BRIDGE those of `Desired.bridged`."""
    text = _with_part(_template(templates, config, table), _GUARD, wanted=surroundings.guard)
    text = _with_part(text, _ROUTED, wanted=table is KernelTable.INET)
    # If all segments are only observed nothing is refused, whichever interface it comes from.
    text = _with_part(text, _KNOWN, wanted=not covers(observed(config), config.patterns()))
    text = _with_literals(text, config, guard=surroundings.guard)
    definitions = _definitions(text)
    values = _values(config, preset, state) | _tunnels(config, surroundings)
    text = _with_values(text, values | {"DEFINITIONS": str(definitions)})
    if surroundings.stacked:
        text += _stacked(templates, surroundings)
    statements = tuple(queue_rules.statements(config.queue, opens=bool(opened(config))))
    text += "".join(queue_rules.probes(config.queue.workers))
    if native:
        text += "".join(map(queue_rules.native, statements))
    if table is KernelTable.BRIDGE:
        text = for_bridge(text, unknown_frames_pass=config.bridge.unknown_frames is UnknownFrames.PASS)
    fixed = _STATE_LINES.sub("", text)
    text += f"add element {table} {COMING_EPOCHS} {_coming(state.generation)}\n"
    if state.unsettled:
        text += f"add element {table} {UNSETTLED} {_indexes(state.unsettled)}\n"
    known, numbers = surroundings.known, _numbers(state)
    return Wanted(table, text, definitions, statements, native, _hooks(surroundings), known, fixed, numbers)


def without_policy(
    templates: Templates,
    config: Config,
    preset: Preset,
    surroundings: Surroundings,
    *,
    native: bool,
    bridged: bool,
) -> Iterator[Wanted]:
    """The ruleset of each table, with the table `bridge` if `bridged`, for a policy table of which nothing is
    known."""
    desired, state = Desired(config, preset, surroundings=surroundings), State(0, synced=False)
    parts = {KernelTable.INET: desired} | ({KernelTable.BRIDGE: desired.bridged()} if bridged else {})
    for table, part in parts.items():
        yield wanted(
            templates, config, preset, native=native, state=state, surroundings=part.surroundings, table=table
        )


def _template(templates: Templates, config: Config, table: KernelTable) -> str:
    """The shipped text for a table."""
    if table is KernelTable.INET or config.bridge.unknown_frames is UnknownFrames.PASS:
        return templates.portward
    return templates.portward + templates.bridge


def _hooks(surroundings: Surroundings) -> dict[str, tuple[int, int]]:
    hooks = HOOKS | TUNNELS_HOOKS
    hooks |= GUARD_HOOKS if surroundings.guard else {}
    return hooks | (STACKED_HOOKS if surroundings.stacked else {})


def stacked_alone(templates: Templates, config: Config, preset: Preset, surroundings: Surroundings) -> str:
    """The chains for devices on top of segments, with the sets and the counter that they name. The kernel loads
    them sooner than the whole ruleset."""
    named = "".join(re.findall(r"(?m)^  (?:counter stacked|set internal[46]) .*\n", templates.portward))
    named = re.sub(r" elements = \S+", "", named)
    return (
        f"define PORTS = {_set(preset.ports)}\ndefine SEGMENTS = {_interfaces(config.patterns())}\n"
        f"table {KernelTable.INET} {{\n{named}}}\n{_stacked(templates, surroundings)}"
    )


def _stacked(templates: Templates, surroundings: Surroundings) -> str:
    return _with_values(templates.stacked, {"STACKED": _indexes(surroundings.stacked)})


def observed(config: Config) -> tuple[str, ...]:
    """The patterns of the interfaces whose segments are only observed."""
    if config.mode is Mode.OBSERVE:
        return config.patterns()
    named = ((name, config.group_named(name)) for name in config.verdicts.observe)
    return tuple(pattern for name, group in named for pattern in ((name,) if group is None else group.interfaces))


def opened(config: Config) -> tuple[str, ...]:
    """The patterns of the interfaces whose sources pass while no worker answers: all, or those that are only
    observed."""
    return config.patterns() if config.on_agent_down is OnAgentDown.OPEN else observed(config)


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
    have, table = set(have_sets), want.table
    lines = [f"add table {table}", f"flush table {table}"]
    lines += [f"delete chain {table} {name}" for name in _misplaced(have_hooks, want.hooks)]
    if STACKED_HOOKS.keys() & have_hooks.keys() - want.hooks.keys():
        # Added first, so that the deletion does not fail if another process has deleted one.
        lines += [f"{verb} chain {table} {name}" for name in _STACKED_CHAINS for verb in ("add", "delete")]
    lines += [f"flush set {table} {name}" for name in _FLUSHED_SETS if name in have]
    lines += [f"delete set {table} {name}" for name in RETIRED_SETS if name in have]
    if not same_definitions:
        lines += [f"delete set {table} {name}" for name in sorted(_FILLED_SETS & have)]
        lines += [f"delete map {table} {name}" for name in sorted(_FILLED_MAPS & have)]
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
        "SEGMENTS": _interfaces(config.patterns()),
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
