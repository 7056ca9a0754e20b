"""The gateway that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel.conftest import br_netfilter
from kernel.evasion.ground import Ground, ground

# The kind of the lab, and whether connections are tracked. br_netfilter shows a bridged frame to the tables of IP,
# too.
KINDS = {
    "conntrack": ("routed", True),
    "no-conntrack": ("routed", False),
    "bridged": ("bridged", True),
    "br_netfilter": ("bridged", False),
}


@pytest.fixture(scope="module", params=KINDS)
def field(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A gateway with and without connection tracking, and one that bridges, with and without br_netfilter. There
    the router tracks connections."""
    kind, conntrack = KINDS[request.param]
    with ground(tmp_path_factory.mktemp("evasion"), conntrack=conntrack, kind=kind) as found:
        if found.bridged:
            br_netfilter(found.lab, on=request.param == "br_netfilter")
        yield found
