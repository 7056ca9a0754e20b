"""One gateway for all faults: what breaks on it must be whole again before the next. It needs root."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from faults.ground import Ground
from kernel.conftest import the_machine_is_left_alone

__all__ = ["the_machine_is_left_alone"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is of the kernel kind."""
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
    """The gateway; another one where an earlier fault left it broken."""
    return _grounds()
