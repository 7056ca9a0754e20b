"""One gateway for all faults. Each fault must leave it working for the next one. The tests need root."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from faults.ground import Ground
from kernel.conftest import the_machine_is_left_alone

__all__ = ["the_machine_is_left_alone"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder as a kernel test."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="module")
def _grounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Ground]]:
    with ExitStack() as stack:
        standing: list[Ground] = []

        def ground() -> Ground:
            if not standing or not standing[0].whole():
                stack.close()
                standing[:] = [stack.enter_context(Ground(tmp_path_factory.mktemp("ground")))]
            return standing[0]

        yield ground


@pytest.fixture
def ground(_grounds: Callable[[], Ground]) -> Ground:
    """The gateway of this module. If an earlier fault left it broken, this is a new one."""
    return _grounds()
