"""The command line: one file for each group of verbs, and no thinking here.

Exit codes: 0 done; 1 refused, or not found; 2 bad usage or bad input. An error is one line on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

from portward.errors import PortwardError


def main() -> None:
    """The program; turns a PortwardError into one line and its exit code."""
    try:
        if (config := _of_service(sys.argv[1:])) is not None:
            from portward import daemon  # noqa: PLC0415 # a start waits for no other verb's libraries

            daemon.run(config)
        else:
            from portward.cli.program import app  # noqa: PLC0415 # as above

            app()
    except PortwardError as error:
        print(f"portward: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Somebody reads only the beginning (| head): no reason for a traceback.
        sys.stderr.close()
        sys.exit(1)


def _of_service(words: list[str]) -> Path | None:
    """FILE, where the words are `run --config FILE`, as a service manager starts the agent. A gateway that starts
    drops the packets of new sources, so it does not wait for the libraries that read any other command line: they
    take a fifth of the whole start."""
    if len(words) == 3 and words[:2] == ["run", "--config"] and not words[2].startswith("-"):
        return Path(words[2])
    return None
