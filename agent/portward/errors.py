"""The mistakes and failures that portward reports to its operator, one line each.

A `PortwardError` is a mistake of a user or a failure of the environment, never a bug in portward. The command line
prints it on stderr and exits with its `exit_code`. Every other exception is a bug, and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from portward.base.characters import shown

_Error = TypeVar("_Error", bound="PortwardError")


class PortwardError(Exception):
    """A failure, with a text for the operator. Its `exit_code` 1 means: refused, or not found."""

    exit_code = 1
    # More mistakes that were found in the same input.
    others: tuple[PortwardError, ...] = ()

    def __str__(self) -> str:
        """The text as one line of printable characters. It may quote untrusted input, and a terminal would obey
        escape sequences, line breaks and marks that change the direction of writing."""
        return printable(super().__str__())

    def lines(self) -> list[str]:
        """The text of this mistake and of each of `others`, one line each."""
        return [str(self), *map(str, self.others)]


class InputError(PortwardError):
    """A mistake in an operator's input. The text names file, line and field, and what would be right. Exit code
    2."""

    exit_code = 2

    def __init__(
        self, problem: str, *, file: str | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        """`file` is the name that the operator gave, `line` counts from 1, `field` is a path such as
        `attachments[3].address`."""
        self.problem, self.file, self.line, self.field = problem, file, line, field
        place = f"{file}:{line}" if file and line else file
        super().__init__(": ".join(part for part in (place, field, problem) if part))


def together(mistakes: Sequence[_Error]) -> _Error:
    """One error for one or more mistakes: the first, with the rest as its `others`."""
    first = mistakes[0]
    first.others = tuple(mistakes[1:])
    return first


class StoreError(PortwardError):
    """The policy store cannot be read or written."""


class ConflictError(StoreError):
    """Another process changed the store between this one's read and its write. Nothing was written."""


class KernelError(PortwardError):
    """The kernel refuses an operation: a feature or a privilege is missing, or a queue is in use."""


def printable(text: str) -> str:
    """An untrusted text as one printable line (see `characters.shown`)."""
    return shown(text)
