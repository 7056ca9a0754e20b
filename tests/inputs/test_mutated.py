"""The program refuses documents that are nearly right with one line, or reads them without loss. The long form is
`python -m tests.inputs.fuzz`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inputs.mutate import KINDS, mutated
from inputs.oracle import Oracle


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory, because each record syncs a table."""
    with TemporaryDirectory(dir="/dev/shm") as found:
        yield Path(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_is_nearly_right(kind: str, folder: Path) -> None:
    where = folder / kind
    where.mkdir()
    oracle = Oracle(kind, where)
    taken: set[bool] = set()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(use_true_random=False))
    def checked(random: Random) -> None:
        taken.add(oracle.check(mutated(kind, random)))

    checked()
    assert taken == {True, False}, "some are taken and some are refused"
