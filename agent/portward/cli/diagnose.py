"""`portward diagnose`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from portward.cli.options import GatewayConfigOption, InstanceOption, JsonOption, configuration, warn
from portward.cli.streams import echo, echo_json, echo_text
from portward.cli.usage import text


def diagnose(
    who: Annotated[
        str, typer.Argument(metavar="SUBSCRIPTION|SEGMENT", help="A subscription's UUID or name, or a segment.")
    ],
    address: Annotated[
        str | None, typer.Argument(metavar="ADDRESS", help="After a segment: a source address in it.")
    ] = None,
    lang: Annotated[
        str | None,
        typer.Option("--lang", metavar="LANG", help="The language, `en` or `fr`; else as the locale says."),
    ] = None,
    customer: Annotated[bool, typer.Option("--customer", help="Print the letter to the customer alone.")] = False,
    json: JsonOption = False,
    everything: Annotated[bool, typer.Option("--all", help="List all machines.")] = False,
    instance: InstanceOption = None,
    config: GatewayConfigOption = None,
) -> None:
    """Explain why an account and its machines may or may not send, what was dropped lately, and the next step.

    Ends with a letter that can be sent to the customer unchanged. SUBSCRIPTION is a UUID or a name. With SEGMENT
    ADDRESS, the account is that of the source.

    Example: portward diagnose fabrikam --lang fr
    """
    from portward.i18n import catalogues  # noqa: PLC0415 # only this verb needs them
    from portward.ops.diagnosis import answer, gather  # noqa: PLC0415 # as above

    if address is None:
        who = text(who, "SUBSCRIPTION")
    words = catalogues.chosen(lang, os.environ)
    preset, found = gather.diagnose(configuration(config, instance), who, address, words)
    if json:
        echo_json(found)
    elif customer:
        warn(found.remarks, err=True)
        echo_text(found.customer)
    else:
        warn(found.remarks)
        for line in answer.lines(preset, found, words, listed=None if everything else answer.LISTED):
            echo(line)
