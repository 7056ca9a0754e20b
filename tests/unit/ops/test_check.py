"""`portward check` finds the mistakes that a start, or a request at three in the morning, would run into."""

from __future__ import annotations

import itertools
import re
from contextlib import closing
from datetime import UTC, date, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from portward.dataplane import genetlink, namespacelock, others, rtnetlink, tunnels, xtables
from portward.dataplane.links import Device
from portward.errors import InputError
from portward.model import Attachment, Subscription
from portward.ops import check
from portward.store.backends import open_store
from portward.store.codec import encode, key_of
from portward.store.values import Put

LEAST = 'segments = ["vni*"]\nuplinks = ["up0"]\n'


def test_a_file_in_place_of_the_tables_folder_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(f'{LEAST}table = "{path}"\n')
    with pytest.raises(InputError, match=r":3: table: '.*portward.toml' is no folder"):
        list(check.check(path))


@pytest.mark.parametrize("with_store", [True, False])
def test_an_instance_needs_another_folder_than_the_hosts_own_agent(tmp_path: Path, with_store: bool) -> None:
    """A line that was forgotten is named at each start, and not only by the operator's check."""
    path = tmp_path / "blue.toml"
    path.write_text(LEAST)
    says = "blue.toml: table: '/var/cache/portward' is the folder of the host's own agent: "
    with pytest.raises(InputError, match=f"{says}/var/cache/portward-instances/blue would be right"):
        list(check.check(path, with_store=with_store, instance="blue"))


class Kernel:
    """A kernel that accepts every change, and whose lock no process has."""

    def owned_table(self, _: str) -> None:
        """None."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: True


def on_a_host(monkeypatch: pytest.MonkeyPatch, *devices: Device) -> None:
    """A host with these interfaces, whose kernel accepts every change."""
    monkeypatch.setattr(check, "Nft", lambda *_: Kernel())
    monkeypatch.setattr(check, "NfNetlink", Kernel)
    monkeypatch.setattr(xtables, "has_native_queue", lambda *_: True)
    monkeypatch.setattr(others, "seen", lambda _: others.NO_OTHERS)
    monkeypatch.setattr(rtnetlink, "devices", lambda: devices)
    monkeypatch.setattr(
        genetlink,
        "tunnel_ports",
        lambda found: tunnels.Ports(tunnels.of_devices(found), frozenset((51820,) if found else ())),
    )


def said(tmp_path: Path, text: str = LEAST) -> list[str]:
    """The lines of `check --without-store` for a configuration."""
    path = tmp_path / "portward.toml"
    path.write_text(text)
    return list(check.check(path, with_store=False))


GROUPED = 'uplinks = ["up0"]\n[[groups]]\nname = "calico"\ninterfaces = ["cali*"]\n'


def test_it_names_the_interfaces_of_a_group_up_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_host(monkeypatch, *(Device(number, f"cali{number}") for number in range(1, 14)))
    lines = said(tmp_path, GROUPED)
    assert lines[0].endswith("portward.toml: segments group calico (cali*); uplinks up0")
    names = ", ".join(f"cali{number}" for number in range(1, 11))
    assert f"group 'calico': {names} and 3 more" in lines
    assert not [line for line in lines if line.startswith("WARNING: group")]


def test_it_warns_of_a_group_without_an_interface_and_of_a_stranger_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_host(monkeypatch, Device(1, "tap1"), Device(2, "pods"))
    lines = said(tmp_path, GROUPED.replace("calico", "pods"))
    assert "WARNING: group 'pods': no interface matches cali* now" in lines
    assert any(line.startswith("WARNING: interface 'pods' has the name of a group") for line in lines)


def test_it_warns_of_attachments_that_name_an_interface_of_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_host(monkeypatch, Device(1, "cali1"))
    path = tmp_path / "portward.toml"
    path.write_text(f'store = "sqlite:portward.db"\ntable = "table"\n{GROUPED}')
    with closing(open_store(f"sqlite:{tmp_path}/portward.db", create=True)) as store:
        owner = Subscription(id=UUID(int=7), offer="csp", created=date(2022, 6, 30))
        wrong = Attachment(segment="cali1", address=ip_network("10.0.0.4"), subscription=owner.id)
        batch = [Put(key_of(record), encode(record)) for record in (owner, wrong)]
        store.write(batch, expected=0, actor="test", at=datetime.now(UTC))
    lines = list(check.check(path))
    assert any(
        line.startswith("WARNING: segment cali1: this interface belongs to group calico here") for line in lines
    )
    assert lines[-1].endswith("revision 1")


def test_it_names_tunnels_that_end_here_and_whose_matter_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Device(number, f"vni{number}", "vxlan", ports=frozenset((4789,))) for number in range(1, 6)]
    on_a_host(monkeypatch, *found, Device(9, "gre1", "gre"))
    lines = said(tmp_path)
    assert "tunnels that end here: gre gre1; vxlan vni1, vni2, vni3 and 2 more; UDP ports 4789, 51820" in lines
    assert any("THIS HOST'S OWN FIREWALL must close them" in line for line in lines)


def test_it_warns_of_a_device_that_takes_a_segments_packets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is printed only once, because a log line would be on the terminal, too."""
    on_a_host(monkeypatch, Device(1, "vni1"), Device(2, "mv0", "macvlan", lower=1))
    assert any(
        line.startswith("WARNING: macvlan mv0 takes the packets of segment vni1") for line in said(tmp_path)
    )
    assert not caplog.records


def test_it_shows_names_that_are_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_host(monkeypatch, Device(1, "vni\udcff\x1b"))
    assert r"segments 'vni*': vni\xff\x1b" in said(tmp_path)


@pytest.mark.parametrize(("with_store", "expected"), [(True, True), (False, False)])
def test_a_program_that_cannot_be_run_is_reported_and_keeps_no_agent_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_store: bool, expected: bool
) -> None:
    on_a_host(monkeypatch)
    path = tmp_path / "portward.toml"
    path.write_text(f'{LEAST}[exemptions]\ncheck = ["{path}", "--quick"]\n')
    lines = list(itertools.islice(check.check(path, with_store=with_store), 6))
    warned = f"WARNING: exemptions.check: {path} cannot be run here: there is no such program, or it may not be "
    assert any(line.startswith(warned) for line in lines) is expected


@pytest.mark.parametrize(
    ("process", "status", "message"),
    [
        (None, None, "there is none yet$"),
        (4711, None, "there is none yet; an agent is starting .process 4711."),
        (4711, {}, "WARNING: .*: there is none, although an agent runs on it .process 4711.: .* makes it anew"),
    ],
)
def test_a_table_that_is_gone_is_no_table_that_is_not_there_yet(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    process: int | None,
    status: dict[str, Any] | None,
    message: str,
) -> None:
    on_a_host(monkeypatch)
    monkeypatch.setattr(check, "running", lambda _: process)
    monkeypatch.setattr(check, "read_status", lambda _: status)
    monkeypatch.setattr(namespacelock, "holder", lambda _: None)
    monkeypatch.setattr(namespacelock, "lasting_holder", lambda _: None)
    path = tmp_path / "portward.toml"
    path.write_text(f'{LEAST}store = "sqlite:portward.db"\ntable = "table"\n')
    with closing(open_store(f"sqlite:{tmp_path}/portward.db", create=True)):
        pass
    lines = list(check.check(path))
    assert [
        line for line in lines if re.search(rf"{tmp_path}/table: there is none", line) and re.search(message, line)
    ]
