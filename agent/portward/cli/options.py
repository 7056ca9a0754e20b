"""Options that many verbs share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import typer

from portward.base.limits import MAX_INTERVAL_S, MIN_INTERVAL_S
from portward.cli.streams import echo
from portward.config.keys import DEFAULT_PATH, Config

ConfigOption: TypeAlias = Annotated[
    Path, typer.Option("--config", "-c", metavar="FILE", help="The configuration.", readable=False)
]
# For verbs about one gateway, which also take `--instance`.
GatewayConfigOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help=f"The configuration; without it, {DEFAULT_PATH}, or that of --instance.",
        readable=False,
    ),
]
InstanceOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--instance",
        "-I",
        metavar="NAME",
        help="The agent in the network namespace NAME, with the configuration /etc/portward/NAME.toml.",
    ),
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for a machine.")]
JsonLinesOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON, for a machine: an object on each line.")
]

# The error of a verb if its question is not answered by yes.
STOPPED: Final = "stopped at the question: nothing was changed"


def configuration(config: Path | None, instance: str | None) -> Path:
    """The path of the configuration that `--config` and `--instance` mean. With an instance, this process is in
    its network namespace from then on: a verb calls this before anything else. Raises PortwardError."""
    if instance is None:
        return config or DEFAULT_PATH
    from portward.ops import instances  # noqa: PLC0415 # few commands need it

    return instances.enter(instance, config)


def warn(lines: Iterable[str], *, err: bool = False) -> None:
    """Prints warnings that belong before the output."""
    for line in lines:
        echo(f"WARNING   {line}", err=err)


def warn_not_following(config: Config) -> None:
    """Warns on standard error if the agent here reads another store than `config` names, or takes in no changes of
    it now. For verbs on the store."""
    from portward.ops.behind import not_following, other_store  # noqa: PLC0415 # a verb without a store does not load it

    warn(filter(None, [other_store(config), not_following(config)]), err=True)


def seconds(value: float) -> float:
    """Checks an option in seconds; raises BadParameter. typer's own `min` and `max` accept NaN."""
    if MIN_INTERVAL_S <= value <= MAX_INTERVAL_S:
        return value
    raise typer.BadParameter(f"{value:g} is not in the range {MIN_INTERVAL_S:g}<=x<={MAX_INTERVAL_S:g}")


__all__ = [
    "DEFAULT_PATH",
    "ConfigOption",
    "GatewayConfigOption",
    "InstanceOption",
    "JsonLinesOption",
    "JsonOption",
    "configuration",
    "seconds",
    "warn",
    "warn_not_following",
]
