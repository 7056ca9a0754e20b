"""What a verb prints, on every terminal: no character, and no state of the streams, ends a verb that has written.

Everything that a verb prints goes through here. Texts of others are escaped (`characters`); what the terminal's
encoding lacks is printed as what looks like it, or as an escape; and a stream that cannot be written to is an
`OutputError`, so that the program can say whether the verb did its work.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, Final, TextIO

import msgspec

from portward.base.characters import alike, json_shown, shown
from portward.config.documents import enc_hook

_ERRORS: Final = "portward"
_STREAMS: Final = 3
# The newest revision that this process has written; none yet.
_revisions: list[int] = []


class OutputError(Exception):
    """Standard output or standard error takes nothing more; `reason` is the system's error."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def prepare() -> None:
    """Makes standard output and error take every character. Called once, before anything is opened: a closed
    stream's number is given to /dev/null, because else the next file that is opened (the store) gets it, and
    whatever a library prints is written into that."""
    _revisions.clear()
    for number in range(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 # as long as the process
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 # as above
    codecs.register_error(_ERRORS, _replaced)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def echo(line: str, *, err: bool = False) -> None:
    """Prints one line; what would make another of it is escaped."""
    _write(sys.stderr if err else sys.stdout, f"{shown(line)}\n")


def echo_text(text: str) -> None:
    """Prints a text of several lines."""
    for line in text.split("\n"):
        echo(line)


def echo_json(value: Any) -> None:
    """Prints a value as one line of JSON: UTF-8, or ASCII if the stream is not UTF-8."""
    try:
        text = msgspec.json.encode(value, enc_hook=enc_hook).decode()
    except UnicodeEncodeError:  # the name of an interface whose bytes are not UTF-8
        text = json.dumps(msgspec.to_builtins(value, enc_hook=enc_hook))
    _write(sys.stdout, json_shown(text, ascii_only=not _is_utf_8(sys.stdout)) + "\n")


def put(text: str) -> None:
    """Writes a piece of a document for another program: always UTF-8, whatever the locale says."""
    if sys.stdout is None:
        return
    with _taken():
        binary = getattr(sys.stdout, "buffer", None)
        if binary is None:
            sys.stdout.write(text)
            return
        sys.stdout.flush()
        binary.write(text.encode("utf-8", "backslashreplace"))


def flush() -> None:
    """Hands over what is still buffered."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with _taken():
                stream.flush()


def note_revision(revision: int) -> int:
    """Notes that the store was changed, as this revision, so that a failure from now on does not look as if
    nothing had been done. Gives the revision."""
    _revisions[:] = [revision]
    return revision


def noted_revision() -> int | None:
    """The revision that this process has written last; None if it has written none."""
    return _revisions[0] if _revisions else None


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed when the program began: nobody wants to read it
        return
    with _taken():
        stream.write(text)
        stream.flush()


@contextlib.contextmanager
def _taken() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(error) from error


def _is_utf_8(stream: TextIO | None) -> bool:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name == "utf-8"


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """codecs' hook for what an encoding lacks. A stream may also be read with it, if it is a file that a caller of
    `main` has put in place of standard output."""
    if not isinstance(error, UnicodeEncodeError):
        replaced, end = codecs.replace_errors(error)
        return str(replaced), end
    return alike(error.object[error.start : error.end]), error.end
