"""`portward rules …`: the ruleset in the kernel."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from portward.cli.options import STOPPED, GatewayConfigOption, InstanceOption, configuration
from portward.cli.streams import echo, put
from portward.errors import InputError, PortwardError

app = typer.Typer(help="The ruleset in the kernel.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(
    wanted: Annotated[
        bool, typer.Option("--wanted", help="Print the text that would be loaded instead, for `nft -c -f -`.")
    ] = False,
    instance: InstanceOption = None,
    config: GatewayConfigOption = None,
) -> None:
    """Print the ruleset that is loaded, without the cached verdicts.

    Example: portward rules show | less
    """
    from portward.ops import rules  # noqa: PLC0415 # only this verb needs nft

    path = configuration(config, instance)
    put(rules.wanted(path) if wanted else rules.loaded(path))


@app.command()
def baseline(instance: InstanceOption = None, config: GatewayConfigOption = None) -> None:
    """Close port 25 before there is an agent, as a gateway does when it boots.

    Loads the ruleset without a worker behind its queue, so unknown sources are dropped. Segments that are only
    observed, or that are open while no agent runs, pass. Changes nothing if the ruleset is loaded already. If the
    configuration cannot be read, no packet to port 25 is forwarded, and the exit code is 1.

    Example: portward rules baseline
    """
    from portward.ops import rules  # noqa: PLC0415 # as above

    echo(rules.baseline(configuration(config, instance)))


@app.command()
def remove(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    instance: InstanceOption = None,
    config: GatewayConfigOption = None,  # not read, because the ruleset in this network namespace is removed
) -> None:
    """Stop enforcing: remove portward's ruleset and all cached verdicts from the kernel.

    Every source may then open connections to port 25. A running agent would put the ruleset back, so it must be
    stopped first: systemctl stop portward, or portward@NAME for an instance.

    Example: portward rules remove --yes
    """
    from portward.ops import rules  # noqa: PLC0415 # as above

    configuration(config, instance)
    if not yes:
        rules.check_removable()
        _ask("Every tenant may then send on port 25. Stop enforcing?")
    echo(rules.remove())


def _ask(question: str) -> None:
    """Asks on the terminal. Raises PortwardError if the answer is not yes, and typer.Abort if there is none."""
    if sys.stdin is None:
        raise InputError("is closed, so no answer can be read: use --yes", file="standard input")
    try:
        agreed = typer.confirm(question)
    except UnicodeDecodeError:  # the answer is not text, so it is not yes
        agreed = False
    if not sys.stdin.isatty():
        echo("")  # the answer from a pipe is not shown, so the question's line has no end
    if not agreed:
        raise PortwardError(STOPPED)
