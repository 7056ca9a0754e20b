"""`make house` measures what its docstring says."""

from __future__ import annotations

from pathlib import Path

import pytest

import house


def test_the_packet_takes_the_fast_path(tmp_path: Path) -> None:
    way = house.packet(tmp_path)
    rooms = {name.partition("/")[0] for name in way.way}
    assert rooms >= {"worker", "table"}
    assert not rooms & {"cli", "daemon", "dataplane", "store"}


@pytest.mark.parametrize("verb", [house._apply, house._revoke])
def test_a_change_is_followed_from_the_verb_to_the_kernel(tmp_path: Path, verb: house.Verb) -> None:
    way = house.change(tmp_path, verb)
    assert {name.partition("/")[0] for name in way.way} >= {"cli", "store", "daemon", "table", "dataplane"}
    assert way.way < way.ran, "helpers that return are not on the way"


@pytest.mark.parametrize("what", ["store", "metric", "preset key", "verb", "reason code"])
def test_the_files_to_edit_are_some(what: str) -> None:
    assert house.edits(what)


def test_what_imports_io_through_others_is_not_free_of_it() -> None:
    free = house.pure()
    direct = {name for name in house.sources() if house.imports(name)[1]}
    users = {name for name in house.sources() if house.imports(name)[0] & direct}
    assert users - direct, "some import it through others only"
    assert not free & (direct | users)
    assert all(house.imports(name)[0] <= free for name in free)


def test_every_goal_is_met() -> None:
    goals = {goal.name: goal for goal in house.goals()}
    assert [str(goal) for goal in goals.values() if not goal.met] == []
    assert goals["longest file"].figure == max(text.count("\n") for text in house.sources().values())
    assert "≥ 30" in str(goals["lines free of I/O, also transitively"])
