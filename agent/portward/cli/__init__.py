"""The command line: one file for each group of verbs, and no thinking here.

Exit codes: 0 done; 1 refused, or not found; 2 bad usage or bad input; 130 interrupted. An error is one line on
stderr.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from pathlib import Path
from typing import Final

from portward.cli import streams
from portward.errors import PortwardError

# Where standard output goes to has no room, or does not take what is written.
_NOT_TAKEN: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
# 128 and the number of SIGINT, as shells have it.
_INTERRUPTED: Final = 130


def main() -> None:
    """The program; turns a PortwardError into one line and its exit code."""
    streams.prepare()
    code, problem = _outcome()
    if problem:
        _complain(problem)
    _finish()
    sys.exit(code)


def _outcome() -> tuple[int, str]:
    """Runs what the command line says. Gives the exit code, and what is wrong, a line for each problem."""
    try:
        code = _run()
        streams.flush()
    except PortwardError as error:
        return error.exit_code, _after_writing("\n".join(error.lines()))
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except streams.OutputError as error:
        return _unprinted(error.reason)
    except OSError as error:  # of a library that prints, rich or typer
        if not isinstance(error, BrokenPipeError) and error.errno not in _NOT_TAKEN:
            raise
        return _unprinted(error)
    # typer makes an exit code of an interrupt within a verb.
    return code, _after_writing(
        "interrupted"
    ) if code == _INTERRUPTED and streams.noted_revision() is not None else ""


def _run() -> int:
    if (config := _of_service(sys.argv[1:])) is not None:
        from portward.daemon import composition  # noqa: PLC0415 # a start waits for no other verb's libraries

        composition.run(config)
        return 0
    from portward.cli import usage  # noqa: PLC0415 # as above

    return usage.run()


def _unprinted(error: OSError) -> tuple[int, str]:
    """What to make of output that could not be printed. A reader that has left (| head) is no failure of a verb
    that has done its work, nor a reason for any words."""
    if isinstance(error, BrokenPipeError):
        return (1 if streams.noted_revision() is None else 0), ""
    return 1, _after_writing(f"standard output: {error.strerror}")


def _after_writing(problem: str) -> str:
    """The problem, and the revision that was written all the same: else it looks as if nothing was done."""
    revision = streams.noted_revision()
    if revision is None or re.search(rf"\brevision {revision}\b", problem):
        return problem
    return f"{problem}; the store was changed, as revision {revision}"


def _complain(problem: str) -> None:
    # Standard error may be gone too: then the exit code says it.
    with contextlib.suppress(streams.OutputError):
        for line in problem.splitlines():
            streams.echo(f"portward: {line}", err=True)


def _finish() -> None:
    """Drops what cannot be written: Python's own end would try again, and complain in words of its own."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            setattr(sys, name, None)


def _of_service(words: list[str]) -> Path | None:
    """FILE, where the words are `run --config FILE`, as a service manager starts the agent. A gateway that starts
    drops the packets of new sources, so it does not wait for the libraries that read any other command line: they
    take a fifth of the whole start."""
    if len(words) == 3 and words[:2] == ["run", "--config"] and not words[2].startswith("-"):
        return Path(words[2])
    return None
