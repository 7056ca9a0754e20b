"""What should be loaded: the text of the ruleset for a configuration. Pure but for reading the shipped files.

The text is `rules/nftables/portward.nft` with the operator's values in place of the defaults that stand in
it, and after it `native-queue.nft` where the kernel has nft_queue. A value that finds no place in the file
is an error, so file and code cannot drift apart unseen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Final, NamedTuple
from zlib import crc32

from portward.config import Config, OnAgentDown, Verdicts
from portward.documents import network_text
from portward.gateway import mark
from portward.model import Mode, Network
from portward.policy.preset import Preset
from portward.resources import rules

TABLE: Final = "portward"
FAMILY_TABLE: Final = "inet portward"

# Sets whose elements the ruleset text names and nothing changes while it is loaded.
FIXED_SETS: Final = (
    "definitions", "segments", "observed_segments", "open_segments",
    "internal4", "internal6", "octets4", "octets6",
)  # fmt: skip
# Sets that packets fill, by class, without the family's digit.
LEARNED_SETS: Final = {
    mark.Class.ALLOW: "allow",
    mark.Class.DENY: "deny",
    mark.Class.OBSERVED: "observed",
    mark.Class.REFUSED: "refused",
    mark.Class.UNKNOWN: "unknown",
}
COUNTERS: Final = (
    "internal", "missed", "answered", "answered_stale", "unlearned", "limited", "limited_all", "stale",
    "unjudged", "unjudged_open", "headers", "unknown", "held",
)  # fmt: skip

_NO_INTERFACE: Final = "no interface"  # a name that no interface can have
# The committed rate of a segment may come at once for so many seconds.
_COMMITTED_BURST: Final = 4
_LOOPBACK: Final = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


class State(NamedTuple):
    """What the ruleset says of the policy table when it is loaded: both numbers are the table's."""

    generation: int
    synced: bool  # what the kernel remembers agrees with it


class Wanted(NamedTuple):
    """The ruleset that should be loaded, and the rules of the xtables queue where that is the way."""

    text: str
    definitions: int  # checksum of the definitions of the learned sets: where it differs, they are made anew
    queues: range
    ports: tuple[int, ...]
    native: bool
    open: bool  # some misses pass where nobody answers


def wanted(config: Config, preset: Preset, *, native: bool, state: State) -> Wanted:
    """The ruleset for a configuration on a kernel with (`native`) or without nft_queue."""
    text = _with_literals(rules("nftables", "portward.nft").read_text(), config)
    definitions = _definitions(text)
    text = _with_values(text, _values(config, preset, state) | {"DEFINITIONS": str(definitions)})
    queues = range(config.queue.first, config.queue.first + config.queue.workers)
    opens = config.on_agent_down is OnAgentDown.OPEN or bool(observed(config))
    if native:
        text += _native_queue(queues, opens=opens)
    return Wanted(text, definitions, queues, preset.ports, native, opens)


def observed(config: Config) -> tuple[str, ...]:
    """The segment patterns that are only observed."""
    return config.segments if config.mode is Mode.OBSERVE else config.verdicts.observe


def replacement(want: Wanted, have_sets: Iterable[str], *, same_definitions: bool) -> str:
    """One transaction that puts `want` in place of what is loaded, and keeps what the kernel remembers.

    `have_sets` are the sets of the table now. Base chains stay: removing a hook would drop every packet that
    waits in any queue of the namespace. Learned sets are made anew only where their definition differs.
    """
    have = set(have_sets)
    learned = {f"{name}{family}" for name in LEARNED_SETS.values() for family in "46"}
    learned |= {"miss_rate", "committed_rate", "share", "limited_segments"}
    lines = [f"add table {FAMILY_TABLE}", f"flush table {FAMILY_TABLE}"]
    lines += [f"flush set {FAMILY_TABLE} {name}" for name in (*FIXED_SETS, "epoch", "synced") if name in have]
    if not same_definitions:
        lines += [f"delete set {FAMILY_TABLE} {name}" for name in sorted(learned & have)]
    return "\n".join(lines) + "\n" + want.text


def xtables_rules(want: Wanted) -> tuple[tuple[str, ...], ...]:
    """Arguments of iptables and ip6tables for the rules of chain PORTWARD in the raw table.

    They match the whole of our mark value and the judged ports, so a mark of someone else asks nobody.
    """
    queue = (
        ("--queue-balance", f"{want.queues[0]}:{want.queues[-1]}")
        if len(want.queues) > 1
        else ("--queue-num", str(want.queues[0]))
    )
    match = (
        "-p",
        "tcp",
        "-m",
        "multiport",
        "--dports",
        ",".join(map(str, want.ports)),
        "-m",
        "mark",
        "--mark",
    )
    target = ("-j", "NFQUEUE", *queue)
    found: list[tuple[str, ...]] = [(*match, f"{mark.MISS:#x}/{mark.OWN:#x}", *target)]
    for place, number in enumerate(want.queues, start=1):
        asked = ("-i", "lo", "-p", "tcp", "--sport", str(place), "-m", "mark", "--mark")
        found.append((*asked, f"{mark.PROBE:#x}/{mark.OWN:#x}", "-j", "NFQUEUE", "--queue-num", str(number)))
    if want.open:
        found.append((*match, f"{mark.MISS_OPEN:#x}/{mark.OWN:#x}", *target, "--queue-bypass"))
    return tuple(found)


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
    """A checksum of the lines that define the learned sets."""
    return crc32("\n".join(re.findall(r"(?m)^ +set \w+ \{.*dynamic.*$", text)).encode())


def _native_queue(queues: range, *, opens: bool) -> str:
    to = f"{queues[0]}-{queues[-1]}" if len(queues) > 1 else str(queues[0])
    lines = rules("nftables", "native-queue.nft").read_text().splitlines(keepends=True)
    probe = next(line for line in lines if "$PROBE" in line)
    lines.remove(probe)
    text = "".join(line for line in lines if opens or "bypass to" not in line)
    text = re.sub(r"(queue (?:flags bypass )?to )0", rf"\g<1>{to}", text)
    asked = (
        probe.replace("sport 1 ", f"sport {place} ").replace("to 0", f"to {queue}")
        for place, queue in enumerate(queues, start=1)
    )
    return "".join(asked) + text


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
