"""The output of verbs. Neither a character nor the state of the streams can make a verb fail after it has written
to the store.

All output goes through here. Untrusted texts are escaped (`characters`). A character that the terminal's encoding
lacks is printed as a similar one, or as an escape. A stream that cannot be written raises `OutputError`, so that
the program can report whether the verb has written to the store.
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
# The newest revision that this process has written; empty before the first one.
_revisions: list[int] = []


class OutputError(Exception):
    """Standard output or standard error cannot be written; `reason` is the system's error."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def prepare() -> None:
    """Makes standard output and error accept every character. Called once, before any file is opened: if a
    standard stream is closed, /dev/null takes its number. Otherwise the next file that is opened, the store, would
    get the number, and the output of libraries would be written into it."""
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
    """Prints one line. Line breaks and other unshown characters are escaped."""
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
    """Writes a piece of a document for another program: always in UTF-8, whatever the locale is."""
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
    """Writes out what is still buffered."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with _taken():
                stream.flush()


def note_revision(revision: int) -> int:
    """Notes that this process has written a revision, so that the error of a later failure names it. Returns the
    revision."""
    _revisions[:] = [revision]
    return revision


def noted_revision() -> int | None:
    """The newest revision that this process has written; None if it has written none."""
    return _revisions[0] if _revisions else None


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # it was closed when the program started
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
    """The error handler for characters that an encoding lacks (`codecs.register_error`). It also handles decoding
    errors, because a caller of `main` may have replaced standard output by a file that is read."""
    if not isinstance(error, UnicodeEncodeError):
        replaced, end = codecs.replace_errors(error)
        return str(replaced), end
    return alike(error.object[error.start : error.end]), error.end
