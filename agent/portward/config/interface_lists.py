"""The mistakes in the lists of interfaces: `segments`, `[[groups]]`, `uplinks` and `[verdicts] observe`. Pure.

A pattern is a name, or the beginning of a name and `*`. So for any two of them it is certain whether an interface
can match both, and no interface that appears later can belong to two segments: a configuration that would allow it
is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from portward.base.interfaces import is_pattern, matches
from portward.config.documents import MISSING, Steps
from portward.config.keys import Config, InterfaceGroup

# A problem, and the steps to its field.
Problem: TypeAlias = tuple[str, Steps]


def problems(config: Config) -> Iterator[Problem]:
    """The mistakes in the lists of interfaces."""
    if not config.segments and not config.groups:
        yield f"{MISSING}: name at least 1 tenant-facing interface, here or in [[groups]]", ("segments",)
    invalid = [*_no_patterns(config), *_no_names(config)]
    yield from invalid
    # A pattern that is not valid would make valid ones look wrong.
    if not invalid:
        yield from _in_two_segments(config)
        yield from _names_of_interfaces(config)
        yield from _uplinks(config)
        yield from _observed(config)


def _no_patterns(config: Config) -> Iterator[Problem]:
    """The texts that are no patterns."""
    lists: list[tuple[Steps, tuple[str, ...]]] = [
        (("segments",), config.segments),
        *((("groups", number, "interfaces"), group.interfaces) for number, group in enumerate(config.groups)),
        (("uplinks",), config.uplinks),
        (("verdicts", "observe"), config.verdicts.observe),
    ]
    for steps, patterns in lists:
        for place, pattern in enumerate(patterns):
            if not is_pattern(pattern):
                yield (
                    f"{pattern!r} is no interface name: up to 15 bytes without space, "
                    "'/', ':', '%', '\"' or '\\', a '*' only at its end and not alone",
                    (*steps, place),
                )


def _no_names(config: Config) -> Iterator[Problem]:
    """The groups whose names no attachment can have, or that have the name of a group before them."""
    taken: set[str] = set()
    for number, group in enumerate(config.groups):
        if "*" in group.name or not is_pattern(group.name):
            yield (
                f"{group.name!r} is no name for a group: up to 15 bytes without space, '/', ':', '%', '\"', '\\' "
                "or '*'",
                ("groups", number, "name"),
            )
        elif group.name in taken:
            yield f"another group has the name {group.name!r} already", ("groups", number, "name")
        taken.add(group.name)


def _in_two_segments(config: Config) -> Iterator[Problem]:
    """The patterns of groups that can match an interface of another segment, of which it would not be clear whose
    sources are behind it."""
    for number, group in enumerate(config.groups):
        for place, pattern in enumerate(group.interfaces):
            steps = ("groups", number, "interfaces", place)
            if (other := _first(pattern, config.segments)) is not None:
                yield f"{pattern!r} and {other!r} in `segments` can match the same interface", steps
            for before in config.groups[:number]:
                if (other := _first(pattern, before.interfaces)) is not None:
                    yield f"{pattern!r} and {other!r} of group {before.name!r} can match the same interface", steps


def _names_of_interfaces(config: Config) -> Iterator[Problem]:
    """The groups whose names are those of interfaces of others: a name would mean two things in verbs and
    records."""
    for number, group in enumerate(config.groups):
        for what, patterns in _others(config, group):
            if (other := _first(group.name, patterns)) is not None:
                yield (
                    f"{group.name!r} is also a name that {other!r} {what} matches: a group needs a name that only "
                    "its own interfaces may have",
                    ("groups", number, "name"),
                )


def _others(config: Config, group: InterfaceGroup) -> Iterator[tuple[str, tuple[str, ...]]]:
    """All lists of interfaces except a group's own, with the words that follow a pattern of the list."""
    yield "in `segments`", config.segments
    yield "in `uplinks`", config.uplinks
    for other in config.groups:
        if other != group:
            yield f"of group {other.name!r}", other.interfaces


def _uplinks(config: Config) -> Iterator[Problem]:
    """The uplinks that are tenant-facing, too."""
    for place, uplink in enumerate(config.uplinks):
        if _first(uplink, config.patterns()) is not None:
            yield f"{uplink!r} is also a segment: incoming mail would get a verdict too", ("uplinks", place)


def _observed(config: Config) -> Iterator[Problem]:
    """The names under `[verdicts] observe` that are no segments."""
    for place, pattern in enumerate(config.verdicts.observe):
        if config.group_named(pattern) is not None:
            continue
        group = next((one for one in config.groups if _first(pattern, one.interfaces) is not None), None)
        if group is not None:
            problem = f"{pattern!r} can match interfaces of group {group.name!r}: a group is observed by its name"
            yield problem, ("verdicts", "observe", place)
        elif _first(pattern, config.segments) is None:
            yield f"{pattern!r} is not one of the segments", ("verdicts", "observe", place)


def _first(pattern: str, others: Iterable[str]) -> str | None:
    """The first of the other patterns that can match the same interface as this one."""
    return next((other for other in others if _overlap(pattern, other)), None)


def _overlap(one: str, other: str) -> bool:
    """Whether an interface name can match both patterns."""
    stems = one.removesuffix("*"), other.removesuffix("*")
    if one.endswith("*") and other.endswith("*"):
        return stems[0].startswith(stems[1]) or stems[1].startswith(stems[0])
    return matches((one,), stems[1]) if one.endswith("*") else matches((other,), one)
