"""10,000 changes of one source while its packets flow and its worker waits up to 3 ms before each verdict."""

from __future__ import annotations

from pathlib import Path

from bench.figures import Figure
from kernel.churn import churned
from kernel.conftest import lab_name
from portward.lab.topology import CONTOSO, FABRIKAM, Lab


def measure(folder: Path, changes: int = 10_000) -> list[Figure]:
    """`stale_verdicts_ipv4` and `_ipv6`: how many stale verdicts were cached."""
    figures = []
    for family, address in (("ipv4", "10.0.0.4"), ("ipv6", "2001:db8:1001::4")):
        with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
            table = folder / family
            stale, cached = churned(
                lab, table, address, changes, lambda churn, committed: churn.carry_out(committed)
            )
        if cached < changes / 20:
            raise RuntimeError(f"only {cached} of {changes} changes found a verdict: nothing was tried")
        unit = f"of {changes} changes, {cached} with a cached verdict"
        figures.append(Figure(f"stale_verdicts_{family}", stale, stale, stale, unit, "<= 0"))
    return figures
