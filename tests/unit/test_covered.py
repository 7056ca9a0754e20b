"""The coverage figure adds up what coverage.py reports, by room."""

from __future__ import annotations

import covered


def summary(statements: int, lines: int, branches: int, taken: int) -> dict[str, dict[str, float]]:
    """A file of the report, with a percentage that cannot be added."""
    return {
        "summary": {
            "num_statements": statements, "covered_lines": lines, "num_branches": branches,
            "covered_branches": taken, "percent_covered": 50.0,
        }
    }  # fmt: skip


FILES = {
    "agent/portward/model.py": summary(10, 10, 0, 0),
    "agent/portward/ops/check.py": summary(10, 5, 4, 1),
    "agent/portward/ops/diagnosis/letter.py": summary(30, 30, 4, 4),
}


def test_the_files_of_a_room_are_added_up_also_those_of_packages_in_it() -> None:
    assert covered.table(FILES, 0)[1:] == [
        "(beside the rooms)                100.0 %    100.0 %   0 of 0",
        "ops                                87.5 %     62.5 %   5 of 8",
        "all                                90.0 %     62.5 %   5 of 8",
    ]


def test_files_with_less_can_be_named() -> None:
    assert covered.table(FILES, 85)[4:] == ["ops/check.py                       50.0 %     25.0 %   1 of 4"]
