"""The text of the ruleset is the shipped file with the operator's values, and no other change."""

from __future__ import annotations

import difflib
import re

import msgspec
import pytest

from portward.base.resources import rules
from portward.config.keys import Config, Encrypted, OnAgentDown, Queue, Tunnels, Verdicts
from portward.dataplane import templates
from portward.dataplane.desired import NOTHING, Surroundings
from portward.dataplane.queue_rules import QueueStatement
from portward.dataplane.ruleset import State, Wanted, replacement, wanted
from portward.model import Mode
from portward.policy import presets

TEMPLATES = templates.read()
CONFIG = Config(segments=("vni*",), uplinks=("up0",))
AZURE = presets.load("azure-2020")
STATE = State(generation=0, synced=True)


def changed(config: Config, preset: str = "azure-2020", state: State = STATE) -> list[str]:
    """The lines of the ruleset that differ from the shipped file, without the lines added at its end."""
    text = wanted(TEMPLATES, config, presets.load(preset), native=False, state=state).text
    shipped = rules("nftables", "portward.nft").read_text()
    lines = difflib.ndiff(shipped.splitlines(), text.splitlines())
    found = [line[2:].strip() for line in lines if line.startswith("+ ")]
    return [line for line in found if not line.startswith("add ")]


def added(config: Config, *, native: bool) -> list[str]:
    """The lines added at the end of the shipped file, without the coming epochs."""
    text = wanted(TEMPLATES, config, AZURE, native=native, state=STATE).text
    return [line for line in text.splitlines() if line.startswith("add ") and " coming " not in line]


def test_the_defaults_are_those_of_the_shipped_file() -> None:
    assert [line.split(" = ")[0] for line in changed(CONFIG)] == ["define DEFINITIONS"]


def test_values_stand_where_they_belong() -> None:
    config = Config(
        segments=("vni*", "tap1"),
        uplinks=("up0",),
        queue=Queue(
            segment_rate=7,
            segment_burst=8,
            segment_committed=3,
            rate=9,
            burst=10,
            source_resets=14,
            segment_resets=15,
            resets=16,
        ),
        verdicts=Verdicts(
            observe=("tap1",),
            allow_seconds=10,
            deny_seconds=12,
            unknown_seconds=13,
            sources=1024,
            segment_sources=100,
        ),
    )
    assert [line for line in changed(config, state=State(8192, synced=True)) if "DEFINITIONS" not in line] == [
        'define SEGMENTS = { "vni*", "tap1" }',
        'define OBSERVED_SEGMENTS = { "tap1" }',
        'define OPEN_SEGMENTS = { "tap1" }',
        "define CURRENT_EPOCH = 0x00000008",
        "define SYNCED = 8192",
        "set allow4 { typeof iif . ip saddr; flags dynamic,timeout; timeout 10s; size 1024; counter; }",
        "set allow6 { typeof iif . ip6 saddr; flags dynamic,timeout; timeout 10s; size 1024; counter; }",
        "set deny4 { typeof iif . ip saddr; flags dynamic,timeout; timeout 12s; size 1024; counter; }",
        "set deny6 { typeof iif . ip6 saddr; flags dynamic,timeout; timeout 12s; size 1024; counter; }",
        "set observed4 { typeof iif . ip saddr; flags dynamic,timeout; timeout 12s; size 1024; counter; }",
        "set observed6 { typeof iif . ip6 saddr; flags dynamic,timeout; timeout 12s; size 1024; counter; }",
        "set refused4 { typeof iif . ip saddr; flags dynamic,timeout; timeout 12s; size 1024; counter; }",
        "set refused6 { typeof iif . ip6 saddr; flags dynamic,timeout; timeout 12s; size 1024; counter; }",
        "set unknown4 { typeof iif . ip saddr; flags dynamic,timeout; timeout 13s; size 16384; }",
        "set unknown6 { typeof iif . ip6 saddr; flags dynamic,timeout; timeout 13s; size 16384; }",
        "update @miss_rate { iif limit rate over 7/second burst 8 packets } "
        "counter name limited goto limit_segment",
        "update @committed_rate { iif limit rate 3/second burst 12 packets } goto ask",
        "limit rate over 9/second burst 10 packets counter name limited_all goto refuse",
        *(
            f"update @reset_rate{source} limit rate over 14/second burst 14 packets }} counter name held drop"
            for source in ("4 { iif . ip saddr", "6 { iif . ip6 saddr")
        ),
        "update @reset_segments { iif limit rate over 15/second burst 15 packets } counter name held drop",
        "update @committed_rate { iif limit rate 3/second burst 12 packets } goto ask_reset",
        "limit rate over 16/second burst 16 packets counter name held drop",
        *(
            f"update @share {{ iif limit rate over 500/minute burst 100 packets }} counter name unlearned {after}"
            for after in ("goto pass_uncached", "goto drop_uncached", "goto pass_uncached", "goto drop_uncached")
        ),
    ]


def test_ports_and_prefixes_come_from_the_preset() -> None:
    assert "define PORTS = { 25, 465, 587 }" in changed(CONFIG, "digitalocean")


def test_a_table_that_is_not_in_step_is_said_not_to_be() -> None:
    assert "define SYNCED = 5" in changed(CONFIG, state=State(5, synced=True))
    assert "define SYNCED = 5" not in changed(CONFIG, state=State(5, synced=False))


def test_a_name_that_a_wildcard_covers_is_left_out() -> None:
    """nft refuses an interval set whose elements overlap."""
    config = Config(segments=("vni1001", "vni*", "vni10*", "tap0", "vni*"), uplinks=("up0",))
    assert 'define SEGMENTS = { "vni*", "tap0" }' in changed(config)


def test_bypass_is_set_only_for_segments_that_must_stay_open() -> None:
    def bypasses(config: Config) -> tuple[bool, set[str]]:
        want = wanted(TEMPLATES, config, AZURE, native=True, state=STATE)
        chains = {statement.chain for statement in want.statements if statement.bypass}
        return "add rule inet portward to_workers_open queue flags bypass to 0\n" in want.text, chains

    assert bypasses(CONFIG) == (False, set())
    for opens in (
        msgspec.structs.replace(CONFIG, on_agent_down=OnAgentDown.OPEN),
        msgspec.structs.replace(CONFIG, mode=Mode.OBSERVE),
        msgspec.structs.replace(CONFIG, verdicts=Verdicts(observe=("vni7",))),
    ):
        assert bypasses(opens) == (True, {"to_workers_open"})


def test_open_when_the_agent_is_down_observes_nothing() -> None:
    lines = changed(msgspec.structs.replace(CONFIG, on_agent_down=OnAgentDown.OPEN))
    assert 'define OPEN_SEGMENTS = { "vni*" }' in lines
    assert not any(line.startswith("define OBSERVED_SEGMENTS") for line in lines)


def test_each_worker_has_a_queue_and_is_asked_by_a_source_port_of_its_own() -> None:
    config = msgspec.structs.replace(CONFIG, queue=Queue(first=3, workers=2))
    want = wanted(TEMPLATES, config, AZURE, native=False, state=STATE)
    assert want.statements == (
        QueueStatement("to_workers", 3, 2),
        QueueStatement("to_worker_1", 3, 1),
        QueueStatement("to_worker_2", 4, 1),
    )
    probes = [
        "add chain inet portward to_worker_1",
        "add rule inet portward probe tcp sport 1 goto to_worker_1",
        "add chain inet portward to_worker_2",
        "add rule inet portward probe tcp sport 2 goto to_worker_2",
    ]
    assert added(config, native=False) == probes
    assert added(config, native=True) == [
        *probes,
        "add rule inet portward to_workers queue to 3-4",
        "add rule inet portward to_worker_1 queue to 3",
        "add rule inet portward to_worker_2 queue to 4",
    ]


# In the order in which they are made. Among chains of equal priority, the newest one sees a packet first.
HOOKS = {"learn": (0, -302), "screen": (0, -302)}


def test_base_chains_that_stand_elsewhere_are_made_anew() -> None:
    want = wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE)
    hooks = {**HOOKS, "theirs": (0, -301)}
    assert removed(want, hooks) == ["theirs"]


@pytest.mark.parametrize(
    "hooks",
    [
        {"screen": (0, -302), "learn": (0, -302)},
        {"screen": (0, -302), "learn": (0, -301)},
        {"learn": (0, -302), "screen": (0, -301)},
        {"screen": (0, -302)},
    ],
    ids=["other-order", "older-release", "other-priority", "one-is-missing"],
)
def test_screen_and_learn_are_made_anew_together(hooks: dict[str, tuple[int, int]]) -> None:
    """If only one were made anew, their order would change, or another program's chain could come between them."""
    assert removed(wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE), hooks) == list(hooks)


def removed(want: Wanted, hooks: dict[str, tuple[int, int]]) -> list[str]:
    """The chains that a replacement deletes."""
    before = replacement(want, (), hooks, same_definitions=True).split(want.text)[0]
    return re.findall(r"(?m)^delete chain inet portward (\w+)$", before)


def test_the_text_registers_learn_before_screen() -> None:
    text = wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE).text
    assert re.findall(r"(?m)^  chain (\w+) \{\n    type filter hook (.*?);.*$", text) == [
        ("learn", "prerouting priority raw - 2"),
        ("screen", "prerouting priority raw - 2"),
        ("tunnels", "input priority raw - 2"),
    ]


GUARDED = Surroundings(guard=True)
GUARD_HOOKS = {"settled": (2, 2**31 - 1), "guard": (2, 2**31 - 1)}


def test_the_guard_stands_in_the_text_only_if_it_is_needed() -> None:
    without = wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE)
    guarded = wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE, surroundings=GUARDED)
    assert "hook forward" not in without.text
    assert "guarded" not in without.text
    assert "hook forward priority 2147483647" in guarded.text
    assert removed(without, {**HOOKS, **GUARD_HOOKS}) == ["settled", "guard"]
    assert removed(guarded, {**HOOKS, **GUARD_HOOKS}) == []
    last = r"(?m)^  chain (\w+) \{\n    type filter hook forward priority 2147483647"
    assert re.findall(last, guarded.text) == ["settled", "guard"]
    assert guarded.definitions == without.definitions, "what is cached stays"


@pytest.mark.parametrize("names", [["guard"], ["settled"], ["guard", "settled"]], ids=" and ".join)
def test_the_guard_and_what_looks_at_its_answers_are_made_anew_together(names: list[str]) -> None:
    """If only one were made anew, their order would change. An older release had only the guard."""
    guarded = wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE, surroundings=GUARDED)
    assert removed(guarded, HOOKS | dict.fromkeys(names, (2, 2**31 - 1))) == names


def test_a_limit_is_counted_once() -> None:
    """If the guard is loaded, the guard counts it."""

    def limits(surroundings: Surroundings) -> list[str]:
        """The first rule of each chain through which a source with a limit passes."""
        text = wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE, surroundings=surroundings).text
        return re.findall(r"(?m)^  chain (?:rate_limited|guarded_limited) \{\n(?:    #.*\n)*    (.*)$", text)

    counted = "tcp flags & (syn | ack) != syn goto within_limit"
    assert limits(NOTHING) == [counted]
    assert limits(GUARDED) == ["accept", counted]


def test_the_guard_has_the_limits_of_the_screen() -> None:
    config = msgspec.structs.replace(
        CONFIG, queue=Queue(segment_rate=7, segment_burst=8, segment_committed=3, rate=9, burst=10)
    )
    text = wanted(TEMPLATES, config, AZURE, native=False, state=STATE, surroundings=GUARDED).text
    for limit, times in (
        ("iif limit rate over 7/second burst 8 packets", 2),
        ("iif limit rate 3/second burst 12 packets", 3),  # `refused` draws on it, too
        ("\n    limit rate over 9/second burst 10 packets", 2),
    ):
        assert text.count(limit) == times


def test_a_replacement_keeps_cached_verdicts_if_definitions_agree() -> None:
    want = wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE)
    kept = replacement(want, {"allow4", "segments", "open_segments", "epoch"}, HOOKS, same_definitions=True)
    assert "flush set inet portward open_segments" in kept
    assert "delete set inet portward segments" in kept, "an older ruleset had it"
    assert "flush set inet portward epoch" in kept
    assert "allow4\n" not in kept.split(want.text)[0]
    assert "delete chain" not in kept, "removing a hook drops what waits in queues"
    remade = replacement(want, {"allow4", "segments"}, HOOKS, same_definitions=False).split(want.text)[0]
    assert "delete set inet portward allow4" in remade
    assert "delete set inet portward allow6" not in remade, "there is none to delete"


def test_definitions_differ_if_a_set_of_cached_verdicts_does() -> None:
    same = wanted(
        TEMPLATES,
        msgspec.structs.replace(CONFIG, mode=Mode.OBSERVE),
        AZURE,
        native=True,
        state=State(9, synced=False),
    )
    other = wanted(
        TEMPLATES,
        msgspec.structs.replace(CONFIG, verdicts=Verdicts(sources=1024)),
        AZURE,
        native=False,
        state=STATE,
    )
    base = wanted(TEMPLATES, CONFIG, AZURE, native=False, state=STATE)
    assert same.definitions == base.definitions
    assert other.definitions != base.definitions


def test_tunnels_are_those_of_the_defaults_the_host_and_the_configuration() -> None:
    around = Surroundings(frozenset((7777, 4789)), frozenset((51820,)))
    config = msgspec.structs.replace(CONFIG, tunnels=Tunnels(ports=(9000,)))
    assert "define TUNNEL_PORTS = { 4789, 6081, 7777, 8472, 9000 }\n" in text_of(config, around)
    config = msgspec.structs.replace(CONFIG, tunnels=Tunnels(encrypted=Encrypted.DROP))
    text = text_of(config, around)
    assert "define TUNNEL_PORTS = { 4500, 4789, 6081, 7777, 8472, 51820 }\n" in text
    assert "define TUNNELS = { 4, 41, 47, 50, 51, 97, 108, 115, 137 }\n" in text


def test_the_forward_chain_is_there_only_while_something_stands_on_a_segment() -> None:
    assert "hook forward" not in text_of(CONFIG, Surroundings())
    text = text_of(CONFIG, Surroundings(stacked=frozenset((12, 7))))
    assert "hook forward" in text
    # No interface can have a name of sixteen digits, because names are shorter.
    assert 'define STACKED = { "0000000000000007", "0000000000000012" }\n' in text


def test_the_forward_chain_goes_when_nothing_stands_on_a_segment_any_more() -> None:
    hooks = HOOKS | {"tunnels": (1, -302), "stacked": (2, -302)}
    for stacked, gone in ((frozenset((7,)), False), (frozenset(), True)):
        want = wanted(
            TEMPLATES, CONFIG, AZURE, native=False, state=STATE, surroundings=Surroundings(stacked=stacked)
        )
        before = replacement(want, (), hooks, same_definitions=True).split(want.text)[0]
        assert ("delete chain inet portward stacked\n" in before) is gone
        assert "delete chain inet portward tunnels" not in before


def text_of(config: Config, surroundings: Surroundings) -> str:
    """The ruleset in these surroundings."""
    return wanted(TEMPLATES, config, AZURE, native=False, state=STATE, surroundings=surroundings).text


@pytest.mark.parametrize(
    ("observe", "stands"),
    [(("vni*",), False), (("v*",), False), (("vni1",), True), ((), True)],
)
def test_mail_from_unknown_interfaces_is_dropped_only_while_a_segment_is_enforced(
    observe: tuple[str, ...], *, stands: bool
) -> None:
    config = Config(segments=("vni*",), uplinks=("up0",), verdicts=Verdicts(observe=observe))
    text = wanted(TEMPLATES, config, presets.load("azure-2020"), native=True, state=State(1, synced=True)).text
    assert ("goto unknown_interface" in text) is stands
