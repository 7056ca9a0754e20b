"""Options that many verbs share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import typer

from portward.base.limits import LONGEST_INTERVAL, SHORTEST_INTERVAL
from portward.cli.streams import say
from portward.config.keys import DEFAULT_PATH, Config

ConfigOption: TypeAlias = Annotated[
    Path, typer.Option("--config", "-c", metavar="FILE", help="The configuration.", readable=False)
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for a machine.")]
JsonLinesOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON, for a machine: an object on each line.")
]

# The error of a verb whose question was not answered by yes.
STOPPED: Final = "stopped at the question: nothing was changed"


def remark(lines: Iterable[str], *, err: bool = False) -> None:
    """Prints what a reader must know before anything else."""
    for line in lines:
        say(f"WARNING   {line}", err=err)


def remark_other_store(config: Config) -> None:
    """Says on standard error if the agent here reads another store than `config` names, for a verb on that one."""
    from portward.ops.behind import other_store  # noqa: PLC0415 # a verb without a store does not load it

    remark(filter(None, [other_store(config)]), err=True)


def seconds(value: float) -> float:
    """The value of an option, if it is a number of seconds that one can wait for; `min` and `max` let NaN pass."""
    if SHORTEST_INTERVAL <= value <= LONGEST_INTERVAL:
        return value
    raise typer.BadParameter(f"{value:g} is not in the range {SHORTEST_INTERVAL:g}<=x<={LONGEST_INTERVAL:g}")


__all__ = [
    "DEFAULT_PATH",
    "ConfigOption",
    "JsonLinesOption",
    "JsonOption",
    "remark",
    "remark_other_store",
    "seconds",
]
