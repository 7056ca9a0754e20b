"""`portward lab …`: a gateway in network namespaces to play with."""

from __future__ import annotations

from typing import Annotated

import typer

from portward.cli.streams import echo
from portward.lab.topology import DEFAULT_NAME

app = typer.Typer(
    help="A gateway with tenants and mail servers in network namespaces (needs root).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
NameOption = Annotated[str, typer.Option("--name", metavar="NAME", help="Several labs can exist side by side.")]


@app.command()
def up(name: NameOption = DEFAULT_NAME) -> None:
    """Make a lab with a running agent, and leave it running.

    Example: portward lab up
    """
    from portward.lab import standing  # noqa: PLC0415 # only this verb needs it

    for line in standing.up(name):
        echo(line)


@app.command()
def down(name: NameOption = DEFAULT_NAME) -> None:
    """Remove a lab and end all processes in it. Exit code 1 if there is none.

    Example: portward lab down
    """
    from portward.lab import standing  # noqa: PLC0415 # only this verb needs it

    echo(standing.down(name))


@app.command()
def demo(
    name: NameOption = "pw-demo",
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove the namespaces.")] = False,
) -> None:
    """Send real mail as each tenant, and compare the results with the expected ones. Exit code 1 if one differs.

    Example: portward lab demo
    """
    from portward.lab import demo as acts  # noqa: PLC0415 # only this verb needs it

    if not acts.run(name, keep=keep):
        raise typer.Exit(1)
