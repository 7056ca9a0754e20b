"""A lab that keeps running: with mail servers, an agent, its files, and hints on what to type next."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from portward.errors import PortwardError
from portward.lab import namespaces
from portward.lab.agent import Agent
from portward.lab.demo import records, sample_inventory, start_mail
from portward.lab.mail import Postbox
from portward.lab.topology import MAIL4, Lab

_FOLDER: Final = Path("/run/portward-lab")


def up(name: str) -> Iterator[str]:
    """Makes the lab `name`, and yields lines that describe it. Raises PortwardError."""
    lab = Lab(name)
    namespaces.require_root()
    if lab.standing():
        raise PortwardError(f"the lab {name} stands already: `portward lab down --name {name}` removes it")
    folder = _FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lab.up()
    try:
        start_mail(lab, Postbox(folder / "mail.jsonl"), detached=True)
        agent = Agent(lab, folder)
        agent.apply(*records())
        agent.start(detached=True)
    except BaseException:
        lab.down()
        raise
    (folder / "inventory.yaml").write_text(sample_inventory(), "utf-8")
    yield f"The lab {name} stands. The agent runs on its gateway with {agent.config}; its log is {agent.log}."
    yield ""
    yield f"  on the gateway   ip netns exec {lab.gateway} bash"
    yield f"                   portward status --config {agent.config}"
    for tenant in lab.tenants:
        yield f"                   portward explain {tenant.segment} {tenant.address4} --config {agent.config}"
    yield f"  change policy    edit {folder / 'inventory.yaml'}"
    yield f"                   portward apply {folder / 'inventory.yaml'} --config {agent.config}"
    for tenant in lab.tenants:
        yield f"  as {tenant.name:<13} ip netns exec {lab.home(tenant)} nc -w 3 {MAIL4} 25"
    yield f"  mail that came   {folder / 'mail.jsonl'}"
    yield f"  remove it        portward lab down --name {name}"


def down(name: str) -> str:
    """Removes the lab `name`, and returns a line on that. Raises PortwardError if there is none."""
    namespaces.require_root()
    found = Lab(name).down()
    shutil.rmtree(_FOLDER / name, ignore_errors=True)
    if not found:
        raise PortwardError(f"there is no lab {name}")
    return f"removed {', '.join(found)}"
