"""`portward policy …`: the presets."""

from __future__ import annotations

from typing import Annotated

import typer

from portward.cli.options import DEFAULT_PATH, ConfigOption, JsonOption
from portward.cli.streams import echo, echo_json
from portward.config.documents import network_text
from portward.config.load import load_config
from portward.policy import presets
from portward.policy.preset import ExemptionPath, Offer, Preset

app = typer.Typer(
    help="The published policies that portward can enforce.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list")
def list_(
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,  # not read, because the presets come with portward
) -> None:
    """List the presets that come with portward.

    Example: portward policy list
    """
    found = [presets.load(name) for name in presets.bundled()]
    if json:
        rows = [
            {
                "name": preset.name,
                "title": preset.title,
                "source_date": preset.source_date,
                "ports": preset.ports,
            }
            for preset in found
        ]
        echo_json(rows)
        return
    for preset in found:
        default = " (default)" if preset.name == presets.DEFAULT else ""
        echo(f"{preset.name:<14}{preset.title}, ports {_numbers(preset)}{default}")


@app.command()
def show(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET",
            help="A preset's name, or the path of your own; without it, the one of the configuration.",
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Show a preset, offer by offer.

    Example: portward policy show azure-2020
    """
    preset = presets.load(load_config(config).preset, named_in=config) if name is None else presets.load(name)
    if json:
        echo_json(preset)
        return
    echo(f"{preset.name}: {preset.title}")
    echo(f"  source    {preset.source} ({preset.source_date})")
    echo(f"  ports     {_numbers(preset)}")
    echo(f"  internal  {', '.join(map(network_text, preset.internal))}")
    echo(f"  restart   {preset.restart or 'not needed for an exemption to count'}")
    paas = "blocked, whatever the offer" if preset.paas_blocked else "as any other workload"
    echo(f"  paas      {paas}")
    for offer in preset.offers:
        _print_offer(", ".join(offer.ids), offer)
    if preset.otherwise is not None:
        _print_offer("any other offer" if preset.offers else "any offer", preset.otherwise)


def _print_offer(ids: str, offer: Offer) -> None:
    echo(f"  offer     {ids}")
    echo(f"              {offer.title}")
    if offer.exemption is ExemptionPath.NOT_NEEDED:
        echo("              allowed")
        return
    before = f"allowed if created before {offer.created_before}, else " if offer.created_before else ""
    needs = f" (takes {', '.join(offer.requires)})" if offer.requires else ""
    echo(f"              {before}blocked; exemption: {offer.exemption}{needs}")
    if offer.asks:
        echo(f"              a request must state, beside its reason: {', '.join(offer.asks)}")


def _numbers(preset: Preset) -> str:
    return ", ".join(map(str, preset.ports))
