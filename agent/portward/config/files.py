"""Configuration files and their text: every read has a bound, and none waits for a writer.

Raises InputError with the file's name, and with line and field if they are known.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from portward.config.documents import brief, dec_hook
from portward.config.toml import decode_toml, toml_mistake
from portward.errors import InputError

T = TypeVar("T")

# The largest TOML file that is read. A preset that lists every prefix of a large cloud has a quarter of it.
_MAX_TOML_BYTES: Final = 1024 * 1024


def read_toml(path: Path, type_: type[T]) -> T:
    """The document at `path` as a value of `type_`, a msgspec struct; raises InputError."""
    return decode_toml(read_text(path, _MAX_TOML_BYTES), str(path), type_, path_hook)


def mistake(path: Path, problem: str, *steps: str | int) -> InputError:
    """The error for the field at `steps` of the TOML file at `path`, which has the right type and is wrong all the
    same. Reads the file again for the line."""
    return toml_mistake(read_text(path, _MAX_TOML_BYTES), str(path), problem, *steps)


def path_hook(type_: Any, value: Any) -> Any:
    """msgspec's decoding hook for structs that also hold paths; else as `documents.dec_hook`."""
    if type_ is not Path:
        return dec_hook(type_, value)
    if not isinstance(value, str):
        raise ValueError(f"expected a path in quotes, got {brief(value)}")
    return Path(value)


def read_text(path: Path, max_bytes: int, *, pipe: bool = False) -> str:
    """The text in a file of at most `max_bytes` bytes; with `pipe`, also what is written to a pipe.
    Raises InputError. Never reads a device, because some have no end; never waits for a pipe's writer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(error.strerror or str(error), file=str(path)) from None
    except ValueError:
        raise InputError("no file has a NUL in its name", file=str(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode) and pipe:
            os.set_blocking(descriptor, True)
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            kind = "pipe" if stat.S_ISFIFO(mode) else "device"
            raise InputError(f"is a {kind}; expected a file", file=str(path))
        elif stat.S_ISDIR(mode):
            raise InputError(os.strerror(errno.EISDIR), file=str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return text_of(file, str(path), max_bytes)
    finally:
        os.close(descriptor)


def text_of(file: BinaryIO, name: str, max_bytes: int) -> str:
    """The text in an open file of at most `max_bytes` bytes; `name` is the file as operators know it. Raises
    InputError."""
    try:
        data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(error.strerror or str(error), file=name) from None
    if len(data) > max_bytes:
        raise InputError(f"larger than {max_bytes >> 20} MiB, the most that is read", file=name)
    try:
        return data.decode("utf-8-sig")  # editors of some systems begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"byte {data[error.start]:#04x} is not UTF-8", file=name, line=line) from None
