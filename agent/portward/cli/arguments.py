"""Arguments, and the environment variables that libraries read, as text. To the system, both are bytes that need
not be UTF-8."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, Final

import typer

from portward.base.characters import from_bytes, shown, unreadable
from portward.errors import InputError

# Names of files and interfaces are bytes to the kernel, so any bytes are valid here.
_BYTES: Final = frozenset(("FILE", "PRESET", "SEGMENT", "SUBSCRIPTION|SEGMENT"))


def text_only(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a verb so that its text arguments are decoded as UTF-8. The wrapper raises InputError with the name of
    an argument that is not UTF-8."""

    @functools.wraps(verb)
    def checked(**given: Any) -> Any:
        return verb(**{name: _read(verb, name, value) for name, value in given.items()})

    return checked


def text(word: str, field: str) -> str:
    """A word of the command line, decoded as UTF-8; raises InputError."""
    word = from_bytes(word)
    if unreadable(word):
        sign = next(sign for sign in word if unreadable(sign))
        raise InputError(f"'{shown(word)}': byte {ord(sign) & 0xFF:#04x} is not UTF-8", field=field)
    return word


def every_verb(app: typer.Typer) -> None:
    """Wraps all verbs of `app` with `text_only`."""
    for info in app.registered_commands:
        if info.callback is not None:
            info.callback = text_only(info.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            every_verb(group.typer_instance)


def drop_unreadable_variables() -> None:
    """Removes environment variables with values that would make a library fail with a traceback."""
    for name in ("COLUMNS", "LINES"):  # rich reads "²" as a number
        if not _is_number(os.environ.get(name, "0")):
            del os.environ[name]
    if not _is_number(os.environ.get("COMP_CWORD", "0")):  # typer's completions for bash
        os.environ["COMP_CWORD"] = "0"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4


def _read(verb: Callable[..., Any], name: str, value: Any) -> Any:
    if isinstance(value, str) and not value.isascii():
        field = _field(verb, name)
        return value if field in _BYTES else text(value, field)
    if isinstance(value, list):
        return [_read(verb, name, one) for one in value]
    return value


def _field(verb: Callable[..., Any], name: str) -> str:
    """The name of a parameter on the command line: `--reason`, `ADDRESS`."""
    annotation = inspect.signature(verb, eval_str=True).parameters[name].annotation
    for found in getattr(annotation, "__metadata__", ()):
        if isinstance(found, typer.models.ArgumentInfo):
            return str(found.metavar)
        if isinstance(found, typer.models.OptionInfo) and str(found.default).startswith("--"):
            return str(found.default)  # typer stores the first name of an annotated option here
    return f"--{name.replace('_', '-')}"
