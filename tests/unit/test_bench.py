"""If a part of `make bench` fails, it is shown with the reason, the other parts go on, and no figure is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench.figures import Curve, Figure, Missing, print_table

CURVE = Curve("c", "a curve", "x", "y", {})


def figure(name: str, value: float = 1.0) -> Figure:
    """A figure without a spread or a goal."""
    return Figure(name, value, value, value, "times")


def whole(_: Path) -> list[Figure | Curve]:
    return [figure("one"), CURVE]


def broken(_: Path) -> Iterator[Figure]:
    yield figure("two")
    raise TimeoutError("not within 10 s: the flood keeps the queue full")


def later(_: Path) -> list[Figure | Curve]:
    return [figure("three")]


def test_a_part_that_fails_loses_neither_its_own_figures_nor_those_of_the_others(tmp_path: Path) -> None:
    found, missing = bench.measure_all({"whole": whole, "broken": broken, "later": later}, tmp_path / "bench.json")
    assert found == [figure("one"), CURVE, figure("two"), figure("three")]
    assert missing == [Missing("broken", "TimeoutError: not within 10 s: the flood keeps the queue full", after=1)]
    assert list(json.loads((tmp_path / "bench.json").read_text())) == ["one", "two", "three"]


def test_what_was_measured_is_written_before_the_next_part_begins(tmp_path: Path) -> None:
    kept = tmp_path / "bench.json"

    def look(_: Path) -> list[Figure | Curve]:
        assert list(json.loads(kept.read_text())) == ["one"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure_all({"whole": whole, "look": look}, kept)
    assert list(json.loads(kept.read_text())) == ["one"]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """Runs the program from `folder`, and returns its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    return bench.main()


def test_the_program_shows_the_reason_and_gives_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_SPEED", {"broken": broken, "later": later})
    assert run(monkeypatch, tmp_path) == 0
    shown = capsys.readouterr().out
    assert "three" in shown
    reason = (
        "broken: the rest of it was not measured: TimeoutError: not within 10 s: the flood keeps the queue full"
    )
    assert reason in " ".join(shown.split())


@pytest.mark.parametrize(("value", "code"), [(0.5, 1), (0.9, 0)])
def test_a_figure_below_its_floor_gives_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float, code: int
) -> None:
    low = figure("cached_deny_vs_static", value)
    monkeypatch.setattr(bench, "_SPEED", {"broken": broken, "fast_path": lambda _: [low]})
    assert run(monkeypatch, tmp_path) == code


def test_the_short_form_gives_1_if_a_figure_with_a_floor_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_SHORT", {"broken": broken})
    assert run(monkeypatch, tmp_path, "--short") == 1
    assert "not measured: bystander_vs_static_rule" in capsys.readouterr().err


def test_a_part_that_gave_nothing_is_not_said_to_have_given_some(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([], [Missing("drain", "RuntimeError: [5] packets wait")])
    assert "drain: not measured: RuntimeError: [5] packets wait" in capsys.readouterr().out
