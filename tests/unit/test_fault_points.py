"""The functions at which the fault suite ends a process exist. So a rename is noticed without a run as root."""

from __future__ import annotations

import pytest

from faults.inject.points import POINTS, Point, find


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_each_point_names_a_function(point: Point) -> None:
    assert callable(getattr(*find(point)[:2]))
