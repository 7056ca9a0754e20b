"""Interface groups in portward.toml: what a name means, and every configuration in which it could mean two things
is refused with file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portward.base.interfaces import covers, matches
from portward.config.interface_lists import problems
from portward.config.keys import Config, InterfaceGroup, Verdicts
from portward.config.load import load_config
from portward.errors import InputError

HEAD = 'segments = ["vni*"]\nuplinks = ["up0"]\n'
CALICO = '[[groups]]\nname = "calico"\ninterfaces = ["cali*", "pod0"]\n'
CONFIG = Config(
    segments=("vni*",),
    uplinks=("up0",),
    groups=(
        InterfaceGroup(name="calico", interfaces=("cali*", "pod0")),
        InterfaceGroup(name="acme", interfaces=("eth2", "eth3")),
    ),
)


def read(tmp_path: Path, text: str) -> Config:
    """The configuration with this text."""
    path = tmp_path / "portward.toml"
    path.write_text(text)
    return load_config(path)


def test_a_file_may_have_groups_beside_segments_and_groups_alone(tmp_path: Path) -> None:
    group = InterfaceGroup(name="calico", interfaces=("cali*", "pod0"))
    assert read(tmp_path, HEAD + CALICO).groups == (group,)
    alone = read(tmp_path, 'uplinks = ["up0"]\n' + CALICO)
    assert (alone.segments, alone.groups) == ((), (group,))


def test_the_segment_behind_an_interface_is_its_group_or_itself() -> None:
    names = ("cali12", "pod0", "eth2", "vni7", "up0", "pod1", "acme", "calico")
    # The last one is an interface that its own group's pattern matches.
    found = ("calico", "calico", "acme", "vni7", None, None, None, "calico")
    assert tuple(map(CONFIG.segment_of, names)) == found
    assert [CONFIG.segment(name) for name in names] == [one is not None for one in found]


def test_all_patterns_are_those_of_segments_and_groups() -> None:
    assert CONFIG.patterns() == ("vni*", "cali*", "pod0", "eth2", "eth3")
    assert CONFIG.segments_in_words() == "vni*, group calico (cali*, pod0), group acme (eth2, eth3)"


def test_a_group_is_observed_as_a_whole_by_its_name(tmp_path: Path) -> None:
    found = read(tmp_path, HEAD + CALICO + '[verdicts]\nobserve = ["calico", "vni1"]\n')
    assert [found.observes(name) for name in ("calico", "cali1", "pod0", "vni1", "vni2")] == [True] * 4 + [False]
    # A pattern that the group's name happens to match is about interfaces of `segments` alone.
    config = Config(
        segments=("a*",),
        uplinks=("up0",),
        groups=(InterfaceGroup(name="pods", interfaces=("cali*",)),),
        verdicts=Verdicts(observe=("a*",)),
    )
    assert [config.observes(name) for name in ("pods", "cali1", "a1")] == [False, False, True]


MISTAKES = {
    "no name": ('[[groups]]\ninterfaces = ["cali*"]\n', 3, "groups[0].name", "is missing"),
    "no interfaces": ('[[groups]]\nname = "calico"\n', 3, "groups[0].interfaces", "is missing"),
    "an empty list": (
        '[[groups]]\nname = "calico"\ninterfaces = []\n', 5, "groups[0].interfaces", "at least 1 entry",
    ),
    "another key": (CALICO + 'mode = "observe"\n', 6, "groups[0].mode", "unknown key"),
    "no table": ('groups = "calico"\n', 3, "groups", "expected a list"),
    "no pattern": ('[[groups]]\nname = "calico"\ninterfaces = ["a b"]\n', 5, "groups[0].interfaces[0]",
                   "'a b' is no interface name"),
    "every interface": ('[[groups]]\nname = "all"\ninterfaces = ["*"]\n', 5, "groups[0].interfaces[0]",
                        "not alone"),
    "no segment name": (CALICO.replace('"calico"', '"cali/1"'), 4, "groups[0].name", "is no name for a group"),
    "a name like a pattern": (CALICO.replace('"calico"', '"cali*"'), 4, "groups[0].name", "is no name"),
    "a long name": (CALICO.replace("calico", "c" * 16), 4, "groups[0].name", "up to 15 bytes"),
    "the same name": (CALICO + '[[groups]]\nname = "calico"\ninterfaces = ["tap*"]\n', 7, "groups[1].name",
                      "another group has the name 'calico' already"),
    "an interface of segments": (
        '[[groups]]\nname = "g"\ninterfaces = ["tap*", "vni12"]\n', 5, "groups[0].interfaces[1]",
        "'vni12' and 'vni*' in `segments` can match the same interface",
    ),
    "a pattern around segments": (
        '[[groups]]\nname = "g"\ninterfaces = ["v*"]\n', 5, "groups[0].interfaces[0]",
        "'v*' and 'vni*' in `segments` can match the same interface",
    ),
    "an interface of another group": (
        CALICO + '[[groups]]\nname = "g"\ninterfaces = ["cali7*"]\n', 8, "groups[1].interfaces[0]",
        "'cali7*' and 'cali*' of group 'calico' can match the same interface",
    ),
    "the name of a segment": (
        '[[groups]]\nname = "vni12"\ninterfaces = ["tap*"]\n', 4, "groups[0].name",
        "'vni12' is also a name that 'vni*' in `segments` matches",
    ),
    "the name of an uplink": (
        '[[groups]]\nname = "up0"\ninterfaces = ["tap*"]\n', 4, "groups[0].name",
        "'up0' is also a name that 'up0' in `uplinks` matches",
    ),
    "the name of another group's interface": (
        CALICO + '[[groups]]\nname = "cali9"\ninterfaces = ["tap*"]\n', 7, "groups[1].name",
        "'cali9' is also a name that 'cali*' of group 'calico' matches",
    ),
    "an uplink": (
        CALICO.replace("pod0", "up*"), 2, "uplinks[0]", "'up0' is also a segment",
    ),
    "a part of a group that is observed": (
        CALICO + '[verdicts]\nobserve = ["cali1*"]\n', 7, "verdicts.observe[0]",
        "'cali1*' can match interfaces of group 'calico': a group is observed by its name",
    ),
    "an unknown group that is observed": (
        CALICO + '[verdicts]\nobserve = ["acme"]\n', 7, "verdicts.observe[0]", "not one of the segments",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported_with_its_place(name: str, tmp_path: Path) -> None:
    text, line, field, problem = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        read(tmp_path, HEAD + text)
    [found] = caught.value.lines()
    assert found.startswith(f"{tmp_path / 'portward.toml'}:{line}: {field}: ")
    assert problem in found


@pytest.mark.parametrize(
    ("text", "line"), [('uplinks = ["up0"]\n', ""), ('segments = []\nuplinks = ["up0"]\n', ":1")]
)
def test_without_any_segment_both_places_are_named(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    [found] = caught.value.lines()
    assert found.startswith(f"{tmp_path / 'portward.toml'}{line}: segments: ")
    assert "here or in [[groups]]" in found


PATTERNS = st.builds(
    lambda stem, wild: stem + wild, st.text("ab", min_size=1, max_size=3), st.sampled_from(("", "*"))
)
NAMES = st.text("ab", min_size=1, max_size=5)


@given(
    st.lists(PATTERNS, max_size=2),
    st.lists(st.tuples(NAMES, st.lists(PATTERNS, min_size=1, max_size=2)), min_size=1, max_size=2),
    NAMES,
)
def test_in_a_configuration_that_is_accepted_a_name_means_one_segment(
    segments: list[str], groups: list[tuple[str, list[str]]], interface: str
) -> None:
    config = Config(
        segments=tuple(segments),
        uplinks=("up0",),
        groups=tuple(InterfaceGroup(name=name, interfaces=tuple(its)) for name, its in groups),
    )
    of = [group.name for group in config.groups if matches(group.interfaces, interface)]
    of += [interface] if matches(config.segments, interface) else []
    if list(problems(config)):
        return
    assert len(of) <= 1
    assert config.segment_of(interface) == next(iter(of), None)
    # The name of a group, as a record has it, is no other segment's.
    for group in config.groups:
        assert config.segment_of(group.name) in (None, group.name)


@given(st.lists(PATTERNS, max_size=3), st.lists(PATTERNS, max_size=3), NAMES)
def test_patterns_cover_others_if_every_name_of_these_matches(
    wide: list[str], patterns: list[str], interface: str
) -> None:
    if covers(wide, patterns) and matches(tuple(patterns), interface):
        assert matches(tuple(wide), interface)


def test_a_pattern_is_covered_by_a_wider_one_alone() -> None:
    assert covers(["cali*"], ["cali*", "cali1*", "cali12"])
    assert not covers(["cali1", "cali2"], ["cali*"])
    assert not covers(["cali1*"], ["cali*"])
    assert covers([], [])
