"""The short forms; the long ones are `python -m tests.fuzz.parser` and `python -m tests.fuzz.queue`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.oracle import Oracle
from fuzz.packets import mutated
from fuzz.queue import fuzz
from kernel.evasion.ground import ground
from portward.config.keys import QueueReader
from portward.ipc.mark import Class

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def oracle(tmp_path: Path) -> Iterator[Oracle]:
    """A worker over a table, whose verdicts are checked."""
    found = Oracle(tmp_path / "table")
    yield found
    found.close()


def test_a_worker_never_says_what_the_policy_does_not(oracle: Oracle) -> None:
    said: set[Class | None] = set()

    @settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(use_true_random=False))
    def classified(random: Random) -> None:
        said.add(oracle.classify(mutated(random)))

    classified()
    assert said >= {None, Class.ALLOW, Class.DENY}


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=600))
def test_any_bytes_get_one_verdict(oracle: Oracle, data: bytes) -> None:
    oracle.classify(data)


@pytest.mark.skipif(
    find_spec("atheris") is None, reason="NOT FUZZED: atheris is not installed (requirements-fuzz.txt)"
)
def test_atheris_finds_nothing_in_a_short_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.parser", "--seconds", "5", "--findings", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert not list(tmp_path.iterdir())


@pytest.mark.kernel
@pytest.mark.parametrize("reader", QueueReader)
def test_random_packets_through_the_queue(tmp_path: Path, reader: QueueReader) -> None:
    with ground(tmp_path, conntrack=False, reader=reader) as field:
        print(fuzz(field, 30_000, seed=Random().randrange(2**32)))
