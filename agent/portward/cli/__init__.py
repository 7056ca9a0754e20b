"""The command line: one file for each group of verbs, and no thinking here.

Exit codes: 0 done; 1 refused, or not found; 2 bad usage or bad input. An error is one line on stderr.
"""

from __future__ import annotations

import sys

import typer

from portward import __version__
from portward.cli import explain, inventory, lab, policy, rules, run, status
from portward.errors import PortwardError

app = typer.Typer(
    name="portward",
    help="Enforces who may open connections to TCP port 25, on the gateway that it runs on.\n\n"
    "Example: portward explain vni1002 10.0.0.4",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("check")(run.check)
app.command("apply")(inventory.apply)
app.command("export")(inventory.export)
app.command("explain")(explain.explain)
app.command("status")(status.status)
app.command("top")(status.top)
app.add_typer(rules.app, name="rules")
app.add_typer(policy.app, name="policy")
app.add_typer(lab.app, name="lab")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"portward {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """The program; turns a PortwardError into one line and its exit code."""
    try:
        app()
    except PortwardError as error:
        print(f"portward: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Somebody reads only the beginning (| head): no reason for a traceback.
        sys.stderr.close()
        sys.exit(1)
