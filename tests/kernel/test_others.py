"""Other programs on the gateway that write rules or marks. They may block allowed sources, but never open port
25."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.conftest import ALLOWED, DENIED, Gateway
from portward.base.resources import rules
from portward.dataplane.namespacelock import LOCK_TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.ipc.mark import Class
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM

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
    # A table with an owner belongs to one process. While that process lives the kernel refuses the agent's
    # changes.
    squatter.write_text("delete table inet portward\nadd table inet portward { flags owner; }\n")
    # The agent is stopped, so that it does not restore its table in between.
    gateway.agent.process.send_signal(signal.SIGSTOP)
    owner = namespaces.start(gateway.lab.gateway, ["sh", "-c", f"tail -n +1 -f {squatter} | nft -i"])
    try:
        until(lambda: "flags owner" in listed(gateway), "another process owns the table")
        gateway.agent.process.send_signal(signal.SIGCONT)
        until(lambda: gateway.agent.metrics()["portward_ruleset_broken"] == 1, "the kernel refuses the ruleset")
        assert gateway.passes(FABRIKAM, "10.0.0.5"), "there is no ruleset"
        namespaces.load(gateway.lab.gateway, rules("nftables", "closed.nft").read_text())
        before = gateway.agent.metrics()
        tries, repairs = "portward_ruleset_repair_tries_total", "portward_ruleset_repairs_total"
        until(lambda: gateway.agent.metrics()[tries] > before[tries] + 2, "it was tried again")
        # Both metrics are from the same refresh, or this one is from a later one.
        assert gateway.agent.metrics()[repairs] == before[repairs], "a failed try is no repair"  # once: see above
        assert "portward_closed" in tables(gateway)
        assert not gateway.passes(FABRIKAM, "10.0.0.5")
        assert not gateway.passes(CONTOSO, "10.0.0.5")
    finally:
        for pid in gateway.lab.run(gateway.lab.gateway, "pgrep", "-P", str(owner.pid)).stdout.split():
            gateway.lab.run(gateway.lab.gateway, "kill", pid)
        owner.kill()
        owner.wait()
    until(lambda: tables(gateway) == {"portward", LOCK_TABLE, "lab"}, "the closed port is taken away")
    until(lambda: gateway.agent.metrics()["portward_ruleset_broken"] == 0, "and says so")
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")


def other(*chains: str) -> str:
    """The text of another program's table with these base chains."""
    bodies = (f"chain c{number} {{ type filter hook {chain}; }}" for number, chain in enumerate(chains))
    return "table inet other {\n" + "\n".join(bodies) + "\n}\n"


MARKS = {
    "none": "meta mark set 0",
    "one": "meta mark set 1",
    "allowed": "meta mark set 0x9",  # a worker's mark of an allow in the second epoch
    "masqueraded": "meta mark set meta mark | 0x4000",
    "half": "meta mark set meta mark & 0xffff00ff",
}
# Priorities before portward's chains, of iptables' table raw, behind that, and of mangle, where most programs set
# marks.
PLACES = ("raw - 10", "raw", "raw + 1", "mangle")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mark", MARKS)
def test_who_sets_marks_changes_no_verdict(gateway: Gateway, mark: str, place: str) -> None:
    address = f"10.0.{10 + PLACES.index(place)}.{10 + [*MARKS].index(mark)}"
    gateway.source(CONTOSO, address, ALLOWED)
    gateway.source(FABRIKAM, address, DENIED)
    rule = f'iifname "vni*" tcp dport 25 {MARKS[mark]}'
    namespaces.load(gateway.lab.gateway, other(f"prerouting priority {place}; {rule}"))
    try:
        for _ in range(2):  # first by a worker's verdict, then by the cached one
            assert gateway.passes(CONTOSO, address)
            assert not gateway.passes(FABRIKAM, address)
    finally:
        namespaces.load(gateway.lab.gateway, "delete table inet other")


# Changes of the mark that another chain could make between the chains `screen` and `learn`: remove the verdict,
# write a constant or a verdict of the current epoch, set, clear and flip bits.
BETWEEN: dict[str, str | Class] = {
    "none": "0",
    "one": "1",
    "kube-proxy": "0x4001",
    "passed": "0xfff9",
    "allow": Class.ALLOW,
    "deny": Class.DENY,
    "observed": Class.OBSERVED,
    "miss-open": Class.OPEN,
    "bits-set": "meta mark | 0x4001",
    "bits-cleared": "meta mark & 0xffff0000",
    "bits-turned": "meta mark ^ 0x5",
}
_AT = ("-303", "-302", "-301")


@pytest.mark.parametrize("when", ["before", "after", "repaired"])
def test_no_chain_of_others_comes_between(make_gateway: MakeGateway, when: str) -> None:
    """The other chains have portward's own priority and the ones next to it. They are loaded before its ruleset,
    after it, and again after a repair. The time matters, because among chains of equal priority the kernel puts
    the newest first, and a repair makes portward's the newest."""
    gateway = make_gateway()
    gateway.source(CONTOSO, "10.0.30.0/24", ALLOWED)
    gateway.source(FABRIKAM, "10.0.30.0/24", DENIED)
    for number, (name, value) in enumerate(BETWEEN.items()):
        epoch = int(re.findall(r"elements = \{ (0x[0-9a-f]+)", gateway.listing("epoch"))[0], 16)
        mark = hex(epoch | value) if isinstance(value, Class) else value
        address = f"10.0.30.{number}"
        text = other(
            *(f'prerouting priority {at}; iifname "vni*" tcp dport 25 meta mark set {mark}' for at in _AT)
        )
        if when == "before":
            text += "delete table inet portward\n"
        repairs = gateway.agent.metrics()["portward_ruleset_repairs_total"]
        namespaces.load(gateway.lab.gateway, text)
        if when == "repaired":
            namespaces.load(gateway.lab.gateway, "delete table inet portward\n")
        try:
            if when != "after":
                until(
                    lambda repairs=repairs: gateway.agent.metrics()["portward_ruleset_repairs_total"] > repairs,  # type: ignore[misc]
                    "the ruleset is back",
                )
            until(lambda: gateway.agent.metrics()["portward_chains_between"] == 1, "the chain at -302 is named")
            for flags in ("S", "S", "A"):
                assert gateway.passes(CONTOSO, address, flags), name
                assert not gateway.passes(FABRIKAM, address, flags), name
        finally:
            namespaces.load(gateway.lab.gateway, "delete table inet other")
    until(lambda: gateway.agent.metrics()["portward_chains_between"] == 0, "none is left")
    assert "table inet other, chain c1, stands at portward's own priority (-302" in gateway.agent.log.read_text()


@pytest.mark.parametrize("value", ["0", "1", "0x4001", "meta mark & 0xffff00ff"])
def test_without_a_mark_of_screen_or_a_worker_nothing_passes(make_gateway: MakeGateway, value: str) -> None:
    """A chain between the two would let nothing pass. The test puts one there by hand, while the agent is
    stopped."""
    gateway = make_gateway()
    assert gateway.agent.process is not None
    gateway.agent.process.send_signal(signal.SIGSTOP)
    text = gateway.agent.portward("rules", "show", "--wanted").stdout
    text = text.replace("define CURRENT_EPOCH = 0x00000000", "define CURRENT_EPOCH = 0x00000008")
    # Chain `screen` gets an earlier priority than it should have, and another chain comes right behind it.
    text = text.replace("chain screen {\n    type filter hook prerouting priority raw - 2;",
                        "chain screen {\n    type filter hook prerouting priority raw - 4;")  # fmt: skip
    between = f'prerouting priority raw - 3; iifname "vni*" tcp dport 25 meta mark set {value}'
    namespaces.load(gateway.lab.gateway, f"delete table inet portward\n{text}\n{other(between)}")
    namespaces.load(
        gateway.lab.gateway,
        "".join(
            f'add element inet portward {name} {{ "{tenant.segment}" . 10.0.31.1 }}\n'
            for tenant, name in ((CONTOSO, "allow4"), (FABRIKAM, "observed4"))
        ),
    )
    try:
        for tenant in (CONTOSO, FABRIKAM):
            for address in ("10.0.31.1", "10.0.31.2"):  # with a cached allow, and without
                for flags in ("S", "A"):
                    assert not gateway.passes(tenant, address, flags)
            assert gateway.passes(tenant, "10.0.31.1", port=587)
        with namespaces.inside(gateway.lab.gateway):
            assert NfNetlink().counters("portward")["unmarked"] > 0
    finally:
        gateway.agent.process.send_signal(signal.SIGCONT)


def test_connection_marks_that_are_saved_and_restored_change_no_verdict(gateway: Gateway) -> None:
    gateway.source(CONTOSO, "10.0.20.1", ALLOWED)
    gateway.source(FABRIKAM, "10.0.20.1", DENIED)
    rules_ = other(
        'prerouting priority -199; iifname "vni*" meta mark set ct mark',
        'postrouting priority srcnat + 50; oifname "up0" ct mark set ct mark | 0x4001',
    )
    namespaces.load(gateway.lab.gateway, rules_)
    try:
        for _ in range(2):
            assert gateway.passes(CONTOSO, "10.0.20.1")
            assert not gateway.passes(FABRIKAM, "10.0.20.1")
    finally:
        namespaces.load(gateway.lab.gateway, "delete table inet other")


def test_chains_that_stand_elsewhere_are_put_where_they_belong(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    # The chains as an older ruleset had them, with another program's table raw in between.
    text = "delete table inet portward\ntable inet portward {\n"
    text += "chain screen { type filter hook prerouting priority raw - 1; }\n"
    text += "chain learn { type filter hook prerouting priority raw + 1; }\n}\n"
    repairs = gateway.agent.metrics()["portward_ruleset_repairs_total"]
    namespaces.load(gateway.lab.gateway, text)
    until(lambda: gateway.agent.metrics()["portward_ruleset_repairs_total"] > repairs, "it is put back")
    until(lambda: "hook prerouting priority raw - 2" in listed(gateway), "the chains stand where they should")
    until(lambda: gateway.agent.metrics()["portward_ruleset_broken"] == 0, "nothing is broken")
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
