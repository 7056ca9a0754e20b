"""The way to the queue is found: nft's own statement or the xtables target. Kernels may lack one of them, or
both."""

from __future__ import annotations

import pytest

from portward.dataplane import xtables
from portward.dataplane.fake import FakeKernel
from portward.errors import KernelError


@pytest.mark.parametrize("native", [True, False])
def test_the_kernels_own_queue_statement_is_found_without_loading_anything(native: bool) -> None:
    kernel = FakeKernel(native=native)
    assert xtables.has_native_queue(kernel.nft()) is native
    assert not kernel.journal


def test_without_any_way_to_a_queue_it_is_said() -> None:
    kernel = FakeKernel(native=False, xtables=False)
    with pytest.raises(KernelError, match=r"no way to a queue: .*No such file or directory"):
        xtables.require(kernel.netlink())
    xtables.require(FakeKernel(native=False).netlink())
