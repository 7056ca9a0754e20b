"""The gateway that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel.evasion.ground import Ground, ground


@pytest.fixture(scope="module", params=[True, False], ids=["conntrack", "no-conntrack"])
def field(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A gateway with and without connection tracking."""
    with ground(tmp_path_factory.mktemp("evasion"), conntrack=request.param) as found:
        yield found
