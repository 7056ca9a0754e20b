"""A test's own process without a free file descriptor."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# So many beyond those that the process has: to take all of the usual limit would take long.
_FEW: Final = 64


def count() -> int:
    """How many descriptors this process has. What earlier tests have left is collected first."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Within this block this process has all the descriptors that it may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A limit is one for numbers: below it must be all that are open, or to close one of them would free nothing.
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
