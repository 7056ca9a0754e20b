"""All verbs of the command line."""

from __future__ import annotations

import typer

from portward import __version__
from portward.cli import (
    attachment,
    audit,
    diagnose,
    exemption,
    explain,
    inventory,
    lab,
    policy,
    rules,
    run,
    status,
    top,
)
from portward.cli.streams import echo
from portward.cli.usage import decode_arguments

app = typer.Typer(
    name="portward",
    help="Controls who may open connections to TCP port 25 through this gateway.\n\n"
    "Example: portward explain vni1002 10.0.0.4",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},  # the contexts of all verbs inherit it
)
app.command("run")(run.run)
app.command("check")(run.check)
app.command("apply")(inventory.apply)
app.command("export")(inventory.export)
app.command("audit")(audit.audit)
app.command("explain")(explain.explain)
app.command("diagnose")(diagnose.diagnose)
app.command("status")(status.status)
app.command("top")(top.top)
app.add_typer(exemption.app, name="exemption")
app.add_typer(attachment.app, name="attachment")
app.add_typer(rules.app, name="rules")
app.add_typer(policy.app, name="policy")
app.add_typer(lab.app, name="lab")
decode_arguments(app)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"portward {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass
