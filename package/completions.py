"""The completions for bash, zsh and fish. Typer writes them, from the program's verbs and options.

    python -m package.completions FOLDER

The files in FOLDER have the paths that they have below /usr/share in the package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

_SHELLS: Final = {
    "bash": "bash-completion/completions/portward",
    "zsh": "zsh/vendor-completions/_portward",
    "fish": "fish/vendor_completions.d/portward.fish",
}


def main() -> None:
    """The command line."""
    for place, text in files().items():
        path = Path(sys.argv[1]) / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


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


if __name__ == "__main__":
    main()
