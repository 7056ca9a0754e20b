"""A test's own process without a free file descriptor."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Descriptors that remain below the lowered limit. Using up the usual limit would take long.
_FEW: Final = 64


def count() -> int:
    """The number of descriptors of this process, after garbage of earlier tests was collected."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Within this block, this process has no free descriptor."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit bounds the numbers of descriptors. It must lie above all open ones, or closing one would free none.
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + _FEW, before[1]))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.eventfd(0))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
