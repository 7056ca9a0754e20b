"""If a library prints to a worker's stdout, the daemon skips that and still reads the worker's requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.conftest import Gateway
from kernel.test_rates import customer, known
from portward.lab.agent import until
from portward.lab.topology import FABRIKAM


def test_a_worker_that_prints_anything_is_still_listened_to(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a source in a prefix gets into the kernel only if the daemon reads the worker's request."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "noisy"))
    gateway = make_gateway()
    metric = 'portward_worker_events_total{event="foreign_line"}'
    until(lambda: gateway.agent.metrics().get(metric, 0) >= 4, "what was printed is counted")
    _, records = customer(FABRIKAM, "10.0.9.0/24")
    gateway.agent.apply(*records)
    for number in (1, 2, 3):
        known(gateway, FABRIKAM, f"10.0.9.{number}")
    log = gateway.agent.log.read_bytes()
    assert b"not understood, and skipped: a library printed this" in log
    assert len(log) < 200_000, "it is not all of it in the log"
