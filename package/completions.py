"""The shells' completions, as the command line's own library writes them; the words come from the program."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

_SHELLS: Final = {
    "bash": "bash-completion/completions/portward",
    "zsh": "zsh/vendor-completions/_portward",
    "fish": "fish/vendor_completions.d/portward.fish",
}


def files() -> dict[str, str]:
    """Path below /usr/share → text, for each shell."""
    return {path: _of(shell) for shell, path in _SHELLS.items()}


def _of(shell: str) -> str:
    code = "import sys; sys.argv[0] = 'portward'; from portward.cli.program import app; app(prog_name='portward')"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "_PORTWARD_COMPLETE": f"source_{shell}"},
    )  # fmt: skip
    return said.stdout.strip() + "\n"
