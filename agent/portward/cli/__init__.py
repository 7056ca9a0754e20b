"""The command line: one file for each group of verbs. A verb reads its options, calls `ops` or `exemptions`, and
prints the result.

Invariants: an error is one line on stderr. Exit codes: 0 done; 1 refused, or not found; 2 bad usage or bad
input; 130 interrupted. If a verb fails after it has written to the store, the error names the revision.

In reading order: here, the program's `main` · `program`, all verbs · `usage`, runs a verb and words its usage
errors · `options`, `actor`, `times`, what many verbs take · `streams`, all output. Then the verbs:
`run` (and check), `inventory` (apply, export), `audit`, `explain`, `diagnose`, `status` and `status_text`, `top`,
`attachment`, `rules`, `policy`, `lab`, and `exemption` with `exemption_options`, `exemption_chosen` and
`exemption_text`.
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

# Standard output has no room, or cannot be written.
_NOT_TAKEN: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
# 128 and the number of SIGINT, as shells have it.
_INTERRUPTED: Final = 130


def main() -> None:
    """Runs the program. Prints a PortwardError in one line, and exits with its exit code."""
    streams.prepare()
    code, problem = _outcome()
    if problem:
        _complain(problem)
    _finish()
    sys.exit(code)


def _outcome() -> tuple[int, str]:
    """Runs the verb of the command line. Returns the exit code, and the error text, one line for each problem."""
    try:
        code = _run()
        streams.flush()
    except PortwardError as error:
        return error.exit_code, _after_writing("\n".join(error.lines()))
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except streams.OutputError as error:
        return _unprinted(error.reason)
    except OSError as error:  # from a library that prints, rich or typer
        if not isinstance(error, BrokenPipeError) and error.errno not in _NOT_TAKEN:
            raise
        return _unprinted(error)
    # typer turns an interrupt within a verb into an exit code.
    return code, _after_writing(
        "interrupted"
    ) if code == _INTERRUPTED and streams.noted_revision() is not None else ""


def _run() -> int:
    if (start := _of_service(sys.argv[1:])) is not None:
        from portward.daemon import composition  # noqa: PLC0415 # a start does not load the other verbs' libraries

        composition.run(*start)
        return 0
    from portward.cli import program, usage  # noqa: PLC0415 # as above

    return usage.run(program.app)


def _unprinted(error: OSError) -> tuple[int, str]:
    """Exit code and error text if the output could not be printed. If the reader has gone (`| head`), a verb that
    has written to the store has not failed, and nothing is printed."""
    if isinstance(error, BrokenPipeError):
        return (1 if streams.noted_revision() is None else 0), ""
    return 1, _after_writing(f"standard output: {error.strerror}")


def _after_writing(problem: str) -> str:
    """The problem, and the revision that was written before it: otherwise it looks as if nothing was written."""
    revision = streams.noted_revision()
    if revision is None or re.search(rf"\brevision {revision}\b", problem):
        return problem
    return f"{problem}; the store was changed, as revision {revision}"


def _complain(problem: str) -> None:
    # If standard error cannot be written either, only the exit code reports the error.
    with contextlib.suppress(streams.OutputError):
        for line in problem.splitlines():
            streams.echo(f"portward: {line}", err=True)


def _finish() -> None:
    """Drops output that cannot be written: at its exit, Python would try again and print an error of its own."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            setattr(sys, name, None)


def _of_service(words: list[str]) -> tuple[Path, str | None] | None:
    """The configuration and the instance, if the command line is `run --config FILE` or `run --instance NAME`, as
    the service manager starts the agent; else None. It skips the libraries that parse other command lines, which
    take a fifth of the start. A gateway drops the packets of new sources until the agent has started."""
    if len(words) != 3 or words[0] != "run" or words[2].startswith("-"):
        return None
    if words[1] == "--config":
        return Path(words[2]), None
    if words[1] == "--instance":
        from portward.ops import instances  # noqa: PLC0415 # as above

        return instances.enter(words[2], None), words[2]
    return None
