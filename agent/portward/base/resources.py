"""portward's shipped files, and how it starts its own processes.

The folder `rules/` is inside the installed package, or beside `agent/` in a checkout.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Final

# The words before `-m MODULE`. If this process is isolated from the caller's folder and environment (-I, as in the
# package), so are its children. Without -I, `-m` imports from their working folder.
PYTHON: Final = (sys.executable, "-I") if sys.flags.isolated else (sys.executable,)
_PACKAGE = Path(__file__).resolve().parents[1]


def rules(*parts: str) -> Path:
    """The path of a shipped file or folder, for example `rules("nftables", "portward.nft")`."""
    installed = _PACKAGE / "rules"
    root = installed if installed.is_dir() else _PACKAGE.parent.parent / "rules"
    return root.joinpath(*parts)


@functools.cache
def text(*parts: str) -> str:
    """The text of a shipped file. It is read once, because a ruleset must be restored even if the process has no
    descriptor left to open its file."""
    return rules(*parts).read_text("utf-8")
