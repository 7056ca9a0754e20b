"""Where the shipped `rules/` folder is: inside the installed package, or beside `agent/` in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def rules(*parts: str) -> Path:
    """Path of a shipped file or folder, for example `rules("nftables", "portward.nft")`."""
    installed = _PACKAGE / "rules"
    root = installed if installed.is_dir() else _PACKAGE.parent.parent / "rules"
    return root.joinpath(*parts)
