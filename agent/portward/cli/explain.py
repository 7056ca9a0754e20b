"""`portward explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from portward.cli.options import GatewayConfigOption, InstanceOption, JsonOption, configuration, warn
from portward.cli.streams import echo, echo_json


def explain(
    segment: Annotated[
        str, typer.Argument(metavar="SEGMENT", help="The segment: an interface such as vni1002, or a group.")
    ],
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The source address, IPv4 or IPv6.")],
    to: Annotated[str | None, typer.Option("--to", metavar="ADDRESS", help="A destination.")] = None,
    json: JsonOption = False,
    instance: InstanceOption = None,
    config: GatewayConfigOption = None,
) -> None:
    """Explain whether a source may open connections to port 25, why, and what its customer can do.

    While an agent runs, the answer comes from the table that its workers read, else from the store.

    Example: portward explain vni1002 10.0.0.4
    """
    from portward.ops import explanation  # noqa: PLC0415 # only this verb needs all of it

    found = explanation.explain(configuration(config, instance), segment, address, to)
    if json:
        echo_json(found)
    else:
        warn(found.remarks)
        for line in explanation.lines(found):
            echo(line)
