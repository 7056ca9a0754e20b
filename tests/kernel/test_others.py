"""Other programs on the same gateway that write rules or marks: they may break what is allowed, and open nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from kernel.conftest import Gateway
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM
from portward.resources import rules

MakeGateway = Callable[..., Gateway]


def tables(gateway: Gateway) -> set[str]:
    """The names of the tables in the gateway's kernel."""
    lines = gateway.lab.run(gateway.lab.gateway, "nft", "list", "tables").stdout.splitlines()
    return {line.split()[-1] for line in lines}


def listed(gateway: Gateway) -> str:
    """portward's table in the gateway's kernel, as nft lists it."""
    return gateway.lab.run(gateway.lab.gateway, "nft", "list", "table", "inet", "portward").stdout


def test_while_the_ruleset_is_refused_a_port_closed_by_hand_stays_closed(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    gateway = make_gateway()
    assert gateway.agent.process is not None
    squatter = tmp_path / "squatter.nft"
    # A table with an owner belongs to one process: the kernel refuses it to the agent while that one lives.
    squatter.write_text("delete table inet portward\nadd table inet portward { flags owner; }\n")
    # Stopped, so that it does not put its table back in between.
    gateway.agent.process.send_signal(signal.SIGSTOP)
    owner = namespaces.start(gateway.lab.gateway, ["sh", "-c", f"tail -n +1 -f {squatter} | nft -i"])
    try:
        until(lambda: "flags owner" in listed(gateway), "the table is somebody else's")
        gateway.agent.process.send_signal(signal.SIGCONT)
        until(lambda: gateway.agent.metrics()["portward_ruleset_broken"] == 1, "the kernel refuses the ruleset")
        assert gateway.passes(FABRIKAM, "10.0.0.5"), "nothing judges"
        namespaces.load(gateway.lab.gateway, rules("nftables", "closed.nft").read_text())
        tries = gateway.agent.metrics()["portward_ruleset_repairs_total"]
        until(lambda: gateway.agent.metrics()["portward_ruleset_repairs_total"] > tries + 2, "it was tried again")
        assert "portward_closed" in tables(gateway)
        assert not gateway.passes(FABRIKAM, "10.0.0.5")
        assert not gateway.passes(CONTOSO, "10.0.0.5")
    finally:
        for pid in gateway.lab.run(gateway.lab.gateway, "pgrep", "-P", str(owner.pid)).stdout.split():
            gateway.lab.run(gateway.lab.gateway, "kill", pid)
        owner.kill()
        owner.wait()
    until(lambda: tables(gateway) == {"portward", "lab"}, "the agent enforces, and takes the closed port away")
    until(lambda: gateway.agent.metrics()["portward_ruleset_broken"] == 0, "and says so")
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
