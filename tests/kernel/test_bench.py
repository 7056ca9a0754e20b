"""The benchmark of workers can start today's workers, and gives a figure even if they are faster than its
sender."""

from __future__ import annotations

from pathlib import Path

from bench import unknown


def test_each_reader_is_measured_with_each_kind_of_source(tmp_path: Path) -> None:
    figures = {figure.name: figure.value for figure in unknown.measure(tmp_path, rounds=1)}
    readers = ("", "_netfilterqueue")
    assert figures.keys() == {f"{kind}{reader}_vs_c_loop" for kind in unknown.KINDS for reader in readers}
    assert all(value > 0 for value in figures.values())
