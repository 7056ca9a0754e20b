"""A warning for segments of an inventory that this host lacks."""

from __future__ import annotations

from portward.config.keys import Config
from portward.ops.mistyped import segments_of, warnings

CONFIG = Config(segments=("vni*", "tap7"), uplinks=("up0",))
HERE = ("lo", "up0", "vni1001", "vni1002")


def test_segments_are_those_of_attachments_each_once() -> None:
    keys = [
        "subscriptions/11111111-0000-4000-8000-000000000002",
        "attachments/vni1001/10.0.0.4",
        "attachments/vni1001/10.0.0.0/24",
        "attachments/vni1002/10.0.0.4",
        "confirmed",
    ]
    assert segments_of(keys) == ["vni1001", "vni1002"]


def test_a_segment_that_is_here_is_no_mistake() -> None:
    assert list(warnings(CONFIG, ["vni1001"], HERE)) == []


def test_a_segment_that_this_configuration_does_not_match_is_warned_of() -> None:
    (line,) = warnings(CONFIG, ["vmi1001"], HERE)
    assert line == (
        "segment vmi1001: none of `segments` in the configuration (vni*, tap7), so this gateway enforces nothing "
        "there"
    )


def test_one_that_matches_and_is_no_interface_here_is_warned_of_with_the_nearest() -> None:
    (line,) = warnings(CONFIG, ["vni10022"], HERE)
    assert line == "segment vni10022: this host has no such interface now; did you mean 'vni1002'?"
    (line,) = warnings(CONFIG, ["tap7"], HERE)
    assert line == "segment tap7: this host has no such interface now"


def test_a_host_without_segments_is_no_gateway() -> None:
    assert list(warnings(CONFIG, ["vni10022"], ("lo", "eth0"))) == []
    assert len(list(warnings(CONFIG, ["vmi1001"], ()))) == 1


def test_many_are_counted() -> None:
    lines = list(warnings(CONFIG, [f"x{number}" for number in range(9)], HERE))
    assert len(lines) == 6
    assert lines[-1] == "and 4 more segments like these"
