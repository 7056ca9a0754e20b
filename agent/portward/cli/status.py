"""`portward status`."""

from __future__ import annotations

from typing import Any

from portward.cli.options import GatewayConfigOption, InstanceOption, JsonOption, configuration, warn
from portward.cli.status_text import lines
from portward.cli.streams import echo, echo_json
from portward.config.keys import Config
from portward.daemon import settings
from portward.daemon.runtime import age_of, hidden, read_status, running
from portward.errors import PortwardError


def status(json: JsonOption = False, instance: InstanceOption = None, config: GatewayConfigOption = None) -> None:
    """Show whether the agent runs here, what it enforces, and what is wrong.

    Exit code 1 if no agent runs.

    Example: portward status --json
    """
    found = settings.settings(configuration(config, instance))
    shown = _read(found.config)
    if json:
        echo_json(shown | {"remarks": found.remarks})
        return
    warn(found.remarks)
    for line in lines(shown, age_of(shown)):
        echo(line)


def _read(config: Config) -> dict[str, Any]:
    """The status that the agent wrote, and whether it is in step with the store. Raises PortwardError if no agent
    runs, or if this user may not read its status."""
    if hidden(config.table):
        raise PortwardError(f"table {config.table}: only root and the agent's own user may see its status")
    pid = running(config.table)
    if pid is None:
        from portward.ops import rules  # noqa: PLC0415 # it loads nft, which the status of a running agent needs not

        raise PortwardError(f"no agent runs on table {config.table}: {rules.without_agent(config)}")
    found = read_status(config.table)
    if found is None:
        raise PortwardError(f"agent {pid} is starting: no status yet")
    return found | _in_step(config, found)


def _in_step(config: Config, found: dict[str, Any]) -> dict[str, Any]:
    """Whether the agent has loaded the store's newest revision at this moment, and if not, what the store has. The
    agent's own status is up to a second older, and older still while it reads another history of the store."""
    if found["store_error"]:
        return {}
    from portward.ops.host import behind_store  # noqa: PLC0415 # it loads what reads the kernel

    why = behind_store(config)
    return {"in_step": False, "newest": why} if why else {}
