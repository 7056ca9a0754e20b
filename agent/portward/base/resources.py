"""What portward's own files are, and how its own processes begin.

The shipped `rules/` folder is inside the installed package, or beside `agent/` in a checkout.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Final

# The words before `-m MODULE`. Where this process keeps the caller's folder and environment out (-I, as in the
# package), those that it starts do too: `-m` alone imports from the folder that they start in.
PYTHON: Final = (sys.executable, "-I") if sys.flags.isolated else (sys.executable,)
_PACKAGE = Path(__file__).resolve().parents[1]


def rules(*parts: str) -> Path:
    """Path of a shipped file or folder, for example `rules("nftables", "portward.nft")`."""
    installed = _PACKAGE / "rules"
    root = installed if installed.is_dir() else _PACKAGE.parent.parent / "rules"
    return root.joinpath(*parts)


@functools.cache
def text(*parts: str) -> str:
    """A shipped file, read once: a ruleset must be put back also if no descriptor is left for its file."""
    return rules(*parts).read_text("utf-8")
