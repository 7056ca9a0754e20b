"""The text of the table `bridge` is that of the table `inet`, with the words of the family and what only a bridge
needs."""

from __future__ import annotations

import difflib
import re

import msgspec
import pytest

from portward.base.resources import rules
from portward.config.keys import Bridge, Config, UnknownFrames
from portward.dataplane import templates
from portward.dataplane.bridgetext import for_bridge
from portward.dataplane.desired import Desired, Surroundings
from portward.dataplane.names import HOOKS, TUNNELS_HOOKS, KernelTable
from portward.dataplane.ruleset import State, Wanted, head, wanted, without_policy
from portward.model import Mode
from portward.policy import presets

CONFIG = Config(segments=("tap*",), uplinks=("eth0",))
PASSING = msgspec.structs.replace(CONFIG, bridge=Bridge(unknown_frames=UnknownFrames.PASS))
AZURE = presets.load("azure-2020")
STATE = State(generation=7, synced=True, unsettled=frozenset((4,)))


def text_of(table: KernelTable, config: Config = CONFIG, *, native: bool = True) -> Wanted:
    """The ruleset of a table."""
    return wanted(templates.read(), config, AZURE, native=native, state=STATE, table=table)


def test_without_bridge_nft_only_words_differ() -> None:
    inet, bridge = (text_of(table, PASSING).text.splitlines() for table in KernelTable)
    changes = [line for line in difflib.ndiff(inet, bridge) if line[0] in "+-"]
    added = {line[2:].strip() for line in changes if line[0] == "+"}
    assert added == {
        "table bridge portward {",
        "type filter hook prerouting priority -302; policy accept;",
        "type filter hook input priority -302; policy accept;",
        "meta protocol ip6 ip6 nexthdr != tcp goto headers6",
        "meta protocol ip6 goto headers6",
        "meta protocol != ip6 accept",
        *(line for line in added if line.startswith("add ")),
    }
    gone = [line[2:].strip() for line in changes if line[0] == "-"]
    assert [line for line in gone if "sdif" in line] == [
        "meta sdifname $SEGMENTS goto from_segment",
        "meta sdifname @observed_segments accept",
    ]


@pytest.mark.parametrize("config", [CONFIG, PASSING], ids=["drop", "pass"])
def test_it_has_no_word_that_the_family_lacks(config: Config) -> None:
    text = text_of(KernelTable.BRIDGE, config).text
    rules_ = re.sub(r"(?m)#.*$", "", text)
    for word in ("inet", "raw", "nfproto", "sdif", "ether", "hook forward", " ct "):
        assert not re.search(rf"\b{word}\b", rules_), word


def test_both_tables_have_the_same_sets_and_hooks() -> None:
    inet, bridge = map(text_of, KernelTable)
    assert inet.definitions == bridge.definitions
    assert inet.hooks == bridge.hooks == HOOKS | TUNNELS_HOOKS
    assert inet.numbers == bridge.numbers
    assert [one.table for one in (inet, bridge)] == list(KernelTable)


def test_each_command_names_the_table() -> None:
    bridge = text_of(KernelTable.BRIDGE)
    before = head(bridge, {"allow4", "epoch", "rates4"}, {"screen": (0, -302)}, same_definitions=False)
    lines = (before + bridge.whole).splitlines()
    commands = [line for line in lines if re.match(r"[a-z]+ [a-z]+ ", line)]
    named = [line for line in commands if not line.startswith("define ")]
    assert len(named) > 10
    assert all(" bridge portward" in line for line in named)
    assert "add rule bridge portward to_workers queue to 0\n" in bridge.text


def test_frames_without_ip_are_dropped_at_the_end_of_screen() -> None:
    """A packet that the first rules leave goes its normal way if the kernel knows its protocol."""
    text = text_of(KernelTable.BRIDGE).text
    assert re.findall(r"(?m)^  chain screen \{\n(?:    .*\n)*?  \}$", text)[1] == (
        "  chain screen {\n"
        "    # The kernel knows the protocol of each IP packet that it could read. This matches all of them, and "
        "nothing else.\n"
        "    meta l4proto 0-255 accept\n"
        "    goto unknown_frame\n"
        "  }"
    )
    assert text.count("exthdr frag missing goto unfragmented6") == 2, "`headers6`, and for other interfaces"
    assert text.count("exthdr frag missing accept") == 1, "to this host: chain `from_segment`"
    assert text.index("chain unfragmented6") < text.index("goto unfragmented6"), "nft wants the chain first"


def test_unknown_frames_pass_if_the_configuration_says_so() -> None:
    text = text_of(KernelTable.BRIDGE, PASSING).text
    assert "unknown_frame" not in text
    assert "unfragmented6" not in text
    assert text.count("exthdr frag missing accept") == 3


def test_if_all_segments_are_only_observed_no_frame_of_another_interface_is_dropped() -> None:
    text = text_of(KernelTable.BRIDGE, msgspec.structs.replace(CONFIG, mode=Mode.OBSERVE)).text
    assert "known_interfaces accept" not in text
    assert text.count("exthdr frag missing goto unfragmented6") == 1
    assert text.count("counter name unknown_frames drop") == 1, "behind the rule for observed segments"


def test_a_text_in_which_a_place_is_missing_is_refused() -> None:
    shipped = templates.read().portward
    for gone in ("priority raw - 2;", "meta nfproto != ipv6"):
        with pytest.raises(ValueError, match="places for"):
            for_bridge(shipped.replace(gone, "", 1), unknown_frames_pass=True)
    with pytest.raises(ValueError, match="0 places for exthdr"):
        for_bridge(shipped.replace("exthdr frag missing", "exthdr frag exists"), unknown_frames_pass=False)


def test_the_stand_in_is_that_of_the_table_inet_in_other_words() -> None:
    inet, bridge = (rules("nftables", name).read_text() for name in ("closed.nft", "closed-bridge.nft"))
    said = [re.sub(r"(?m)^ *#.*\n", "", text) for text in (inet, bridge)]
    said[0] = said[0].replace("inet", "bridge").replace("meta nfproto ipv6", "meta protocol ip6")
    assert said[0] == said[1]


def test_a_device_on_top_of_a_segment_is_no_known_interface_there() -> None:
    around = Surroundings(stacked=frozenset((7,)), known=frozenset((7, 8)), guard=True)
    desired = Desired(CONFIG, AZURE, surroundings=around)
    assert desired.bridged().surroundings == Surroundings(known=frozenset((8,)))
    inet, bridge = without_policy(templates.read(), CONFIG, AZURE, around, native=True, bridged=True)
    assert (inet.known, bridge.known) == (frozenset((7, 8)), frozenset((8,)))
    assert "hook forward" in inet.text
    assert "hook forward" not in bridge.text
    (alone,) = without_policy(templates.read(), CONFIG, AZURE, around, native=True, bridged=False)
    assert alone == inet


def test_what_is_only_of_the_other_table_changes_nothing_in_the_kernel() -> None:
    """A guard that comes and goes loads no ruleset for bridges."""
    desired = Desired(CONFIG, AZURE)
    guarded = desired._replace(surroundings=Surroundings(guard=True, stacked=frozenset((7,))))
    assert not desired.same_ruleset(guarded)
    assert desired.bridged().same_ruleset(guarded.bridged())
