"""The mistakes and failures that portward tells its operator about, each in one line.

A `PortwardError` is somebody's mistake or a broken surrounding, never a bug of ours: the CLI prints it
on stderr in one line and exits with its `exit_code`. Anything else that is raised is a bug and shows
its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from portward.base.characters import shown

_Error = TypeVar("_Error", bound="PortwardError")


class PortwardError(Exception):
    """A failure with a text for the operator; `exit_code` is 1: refused, or not found."""

    exit_code = 1
    # Further mistakes that were found with this one.
    others: tuple[PortwardError, ...] = ()

    def __str__(self) -> str:
        """The text in one line of printable characters: what it quotes was written by others, and a terminal
        would obey the rest (escape sequences, line breaks, marks that turn the direction of writing)."""
        return printable(super().__str__())

    def lines(self) -> list[str]:
        """The text, and that of each further mistake that was found with it, a line each."""
        return [str(self), *map(str, self.others)]


class InputError(PortwardError):
    """What an operator wrote is wrong: names file, line, field and what would be right. Exit code 2."""

    exit_code = 2

    def __init__(
        self, problem: str, *, file: str | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        """`file` as the operator named it, `line` counted from 1, `field` as a path (`attachments[3].address`)."""
        self.problem, self.file, self.line, self.field = problem, file, line, field
        place = f"{file}:{line}" if file and line else file
        super().__init__(": ".join(part for part in (place, field, problem) if part))


def together(mistakes: Sequence[_Error]) -> _Error:
    """Several mistakes, at least one, as one error: that of the first."""
    first = mistakes[0]
    first.others = tuple(mistakes[1:])
    return first


class StoreError(PortwardError):
    """The policy store cannot be read or written."""


class ConflictError(StoreError):
    """Somebody else changed the store between our read and our write; nothing was written."""


class KernelError(PortwardError):
    """The kernel refuses what portward needs: a missing feature, a missing privilege, a taken queue."""


def printable(text: str) -> str:
    """A text that others wrote as one line of it is shown (see `characters`)."""
    return shown(text)
