"""The kernel accepts the smallest and largest values that portward's configuration and grants accept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec
import pytest

from kernel.conftest import Gateway
from kernel.test_rates import customer, known
from portward.base import limits
from portward.config.keys import Queue, Verdicts
from portward.lab.agent import until
from portward.lab.topology import CONTOSO
from portward.model import RateLimit

MakeGateway = Callable[..., Gateway]
# Not the largest number of workers: that many processes are not the subject here. The last queue must exist.
_OTHER = {"workers": 1}
_NAMES = itertools.count(1)


def ends(type_: type[msgspec.Struct], largest: bool) -> dict[str, Any]:
    """The smallest or largest value of each integer key of a table of portward.toml."""
    found = {}
    for name, hint in get_type_hints(type_, include_extras=True).items():
        for meta in getattr(hint, "__metadata__", ()):
            found[name] = meta.le if largest else meta.ge
    return {name: value for name, value in found.items() if value is not None} | (_OTHER if type_ is Queue else {})


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_the_kernel_takes_the_ends_of_every_range(make_gateway: MakeGateway, largest: bool) -> None:
    queue, verdicts = ends(Queue, largest), ends(Verdicts, largest)
    assert {"segment_rate", "burst", "length"} <= queue.keys()
    assert {"allow_seconds", "sources"} <= verdicts.keys()
    gateway = make_gateway(queue=queue, verdicts=verdicts)
    most = RateLimit(per_minute=limits.MAX_RATE_PER_MINUTE, burst=limits.MAX_BURST)
    _, records = customer(CONTOSO, "10.0.0.99", limit=most if largest else RateLimit(per_minute=1, burst=1))
    gateway.agent.apply(*records)
    if largest:  # with the smallest rate, one packet a second for all, a source may wait for ever
        known(gateway, CONTOSO, "10.0.0.99")
    until(lambda: gateway.agent.metrics()["portward_ruleset_broken"] == 0, "nothing is broken")
