"""The command line: one file for each group of verbs, and no thinking here.

Exit codes: 0 done; 1 refused, or not found; 2 bad usage or bad input; 130 interrupted. An error is one line on
stderr.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Final

from portward.errors import PortwardError

# Where standard output goes to has no room, or does not take what is written.
_NOT_TAKEN: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main() -> None:
    """The program; turns a PortwardError into one line and its exit code."""
    try:
        if (config := _of_service(sys.argv[1:])) is not None:
            from portward import daemon  # noqa: PLC0415 # a start waits for no other verb's libraries

            daemon.run(config)
        else:
            from portward.cli import usage  # noqa: PLC0415 # as above

            code = usage.run()
            sys.stdout.flush()
            sys.exit(code)
    except PortwardError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Somebody reads only the beginning (| head): no reason for a traceback.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno not in _NOT_TAKEN:
            raise
        sys.stdout = None  # what is still to be written would fail again
        _end(f"standard output: {error.strerror}", 1)


def _end(problem: str, code: int) -> None:
    print(f"portward: {problem}", file=sys.stderr)
    sys.exit(code)


def _of_service(words: list[str]) -> Path | None:
    """FILE, where the words are `run --config FILE`, as a service manager starts the agent. A gateway that starts
    drops the packets of new sources, so it does not wait for the libraries that read any other command line: they
    take a fifth of the whole start."""
    if len(words) == 3 and words[:2] == ["run", "--config"] and not words[2].startswith("-"):
        return Path(words[2])
    return None
