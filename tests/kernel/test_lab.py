"""The lab without an agent: mail flows, several labs can be up at once, and nothing is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernel.conftest import lab_name
from portward.errors import KernelError, PortwardError
from portward.lab import demo, namespaces
from portward.lab.demo import start_mail
from portward.lab.mail import PORTS, Fate, OpenSession, Postbox, send
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Lab


@contextmanager
def mail(lab: Lab, folder: Path) -> Iterator[Postbox]:
    """The mail servers of a lab that is up."""
    postbox = Postbox(folder / f"{lab.name}.jsonl")
    server = start_mail(lab, postbox)
    try:
        yield postbox
    finally:
        server.kill()
        server.wait()


def machine() -> str:
    """The machine's own links, ruleset and forwarding settings. A lab must not change them: without a link into
    the machine's own network no packet can leave the namespaces."""
    links = "".join(name for _, name in socket.if_nameindex())
    output = links + subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    settings = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter")
    return output + "".join((Path("/proc/sys") / name).read_text() for name in settings)


def test_mail_flows_from_overlapping_tenants_each_under_its_own_address(tmp_path: Path) -> None:
    before = machine()
    with Lab(lab_name()) as lab, mail(lab, tmp_path) as postbox:
        for tenant in lab.tenants:
            for server in (MAIL4, MAIL6):
                for port in PORTS:
                    assert send(lab, tenant, server, port, postbox).fate is Fate.DELIVERED
        peers = {(message["peer"], message["port"]) for message in postbox.messages()}
        assert machine() == before
    assert peers == {
        (address, port)
        for tenant in (CONTOSO, FABRIKAM)
        for address in (tenant.public, tenant.address6)
        for port in PORTS
    }


def test_a_second_demo_in_the_same_lab_leaves_the_first_alone() -> None:
    lab = Lab(lab_name())
    with demo.alone(lab):
        lab.up()
        try:
            with pytest.raises(PortwardError, match=f"process {os.getpid()}, runs in the lab {lab.name}"):
                demo.run(lab.name)
            assert lab.standing()
        finally:
            lab.down()
    with demo.alone(lab):
        pass  # the lock ended with the first demo


def test_an_open_session_goes_on_while_nothing_stops_it(tmp_path: Path) -> None:
    with Lab(lab_name()) as lab, mail(lab, tmp_path) as postbox:
        session = OpenSession(lab, CONTOSO, MAIL4, 25)
        session.go_on()
        assert session.finish(postbox).fate is Fate.DELIVERED


def test_a_session_whose_packets_vanish_times_out_and_one_that_is_refused_says_so(tmp_path: Path) -> None:
    with Lab(lab_name()) as lab, mail(lab, tmp_path) as postbox:
        session = OpenSession(lab, CONTOSO, MAIL4, 25, timeout=1.0)
        drop = "table inet t { chain c { type filter hook forward priority 0; tcp dport 25 drop; }; }"
        namespaces.load(lab.gateway, drop)
        assert session.finish(postbox).fate is Fate.TIMED_OUT
        assert send(lab, FABRIKAM, MAIL4, 25, postbox, timeout=1.0).fate is Fate.TIMED_OUT
        assert send(lab, FABRIKAM, MAIL4, 26, postbox).fate is Fate.REFUSED


def test_labs_stand_side_by_side(tmp_path: Path) -> None:
    with (
        Lab(lab_name()) as one,
        Lab(lab_name()) as other,
        mail(one, tmp_path) as first,
        mail(other, tmp_path) as second,
    ):
        assert send(one, CONTOSO, MAIL4, 25, first).fate is Fate.DELIVERED
        assert second.messages() == []


def test_nothing_is_left_after_down_and_down_again_finds_nothing() -> None:
    lab = Lab(lab_name())
    lab.up()
    lab.up()
    assert len(lab.down()) == 4
    assert lab.down() == []
    assert namespaces.names(lab.name) == []


def test_a_lab_that_fails_in_the_middle_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(lab_name())

    def fails(namespace: str, ruleset: str) -> None:
        raise KernelError("the last step fails")

    monkeypatch.setattr(namespaces, "load", fails)
    with pytest.raises(KernelError, match="last step"):
        lab.up()
    assert namespaces.names(lab.name) == []


def test_a_standing_lab_is_made_and_removed_by_its_verbs() -> None:
    name = lab_name()

    def portward(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "portward", *arguments, "--name", name]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    try:
        made = portward("lab", "up")
        assert made.returncode == 0, made.stderr
        assert f"ip netns exec {name}-gw bash" in made.stdout
        assert "stands already" in portward("lab", "up").stderr
        config = f"/run/portward-lab/{name}/portward.toml"
        output = namespaces.run(
            f"{name}-gw", [sys.executable, "-m", "portward", "explain", "vni1002", "10.0.0.4", "--config", config]
        )
        assert output.stdout.startswith("vni1002 10.0.0.4: DENY"), output.stderr
    finally:
        removed = portward("lab", "down")
    assert removed.returncode == 0
    assert namespaces.names(name) == []
    assert not Path(f"/run/portward-lab/{name}").exists()
    assert portward("lab", "down").returncode == 1


def test_a_lab_takes_only_its_own_namespaces_down() -> None:
    """The name of lab `x` is a prefix of the name of lab `x-more`."""
    name = lab_name()
    with Lab(f"{name}-more") as longer:
        assert Lab(name).down() == []
        assert len(longer.standing()) == 4


@pytest.mark.parametrize("name", ["", "..", "../../etc", "a/b", "*", "x y", "-x", "X"])
@pytest.mark.parametrize("verb", ["up", "down", "demo"])
def test_a_name_that_is_no_name_is_refused_before_anything_is_touched(verb: str, name: str) -> None:
    argv = [sys.executable, "-m", "portward", "lab", verb, f"--name={name}"]
    output = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert output.returncode == 2
    assert "is no name for a lab" in output.stderr
    assert len(output.stderr.splitlines()) == 1
