"""Interface groups, with real packets: an address of a group has one verdict behind all of its interfaces, also
those that come later, and a change of it reaches each of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime
from ipaddress import ip_address, ip_network
from uuid import UUID, uuid4

import pytest

from kernel.conftest import ALLOWED, DENIED, Gateway, running_gateway
from kernel.wire import Seen, link_address, same, segment
from portward.dataplane.elements import Add
from portward.dataplane.names import RATE_LIMITS, TABLE
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.verdict_cache import Source
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, Tenant
from portward.model import Attachment, Exemption, ExemptionState, Mode, RateLimit, Subscription

# A tenant in the other group. Its addresses are those of the first two.
INITECH = Tenant("initech", 2003)
SITE, OTHER = "site", "other"
GROUPS = [{"name": SITE, "interfaces": ["vni10*"]}, {"name": OTHER, "interfaces": ["vni2003", "vni3*"]}]
_GRANTED = datetime(2026, 1, 9, 12, tzinfo=UTC)
_STARTED = datetime(2026, 1, 10, 12, tzinfo=UTC)  # the machines: after that, so an exemption counts for them


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with CONTOSO and FABRIKAM in one group and INITECH in another. Each test uses addresses of its
    own."""
    tenants = (CONTOSO, FABRIKAM, INITECH)
    folder = tmp_path_factory.mktemp("groups")
    with running_gateway(folder, tenants, segments=[], groups=GROUPS) as found:
        yield found


def attach(
    gateway: Gateway, group: str, address: str, offer: str, id_: UUID | None = None, mode: Mode = Mode.ENFORCE
) -> UUID:
    """Attaches an address or prefix in a group to a subscription, and waits until the agent enforces that."""
    id_ = id_ or uuid4()
    gateway.agent.apply(
        Subscription(id=id_, name=str(id_)[:8], offer=offer, created=date(2022, 6, 30), mode=mode),
        Attachment(segment=group, address=ip_network(address), subscription=id_, started=_STARTED),
    )
    return id_


def cached(gateway: Gateway, set_: str, address: str) -> int:
    """Behind how many interfaces the kernel has a source in one of its sets."""
    return gateway.listing(set_).count(f". {address} ")


@pytest.mark.parametrize("source", ["10.1.0.4", "2001:db8:77::4"])
def test_an_address_has_one_verdict_behind_each_interface_of_its_group_and_of_no_other(
    gateway: Gateway, source: str
) -> None:
    attach(gateway, SITE, source, ALLOWED)
    attach(gateway, OTHER, source, DENIED)
    assert gateway.passes(CONTOSO, source)
    assert gateway.passes(FABRIKAM, source)
    assert not gateway.passes(INITECH, source)
    set_ = "allow4" if "." in source else "allow6"
    assert cached(gateway, set_, source) == 2, "the cache is by interface"


def test_an_address_of_another_group_is_unknown(gateway: Gateway) -> None:
    attach(gateway, SITE, "10.1.1.4", ALLOWED)
    assert not gateway.passes(INITECH, "10.1.1.4")
    assert gateway.agent.explain(OTHER, "10.1.1.4")["reason"] == "denied-unknown-source"


def test_an_attachment_to_an_interface_of_a_group_counts_for_nothing(gateway: Gateway) -> None:
    id_ = uuid4()
    gateway.agent.apply(
        Subscription(id=id_, name="wrong", offer=ALLOWED, created=date(2022, 6, 30)),
        Attachment(segment=CONTOSO.segment, address=ip_network("10.1.2.4"), subscription=id_),
    )
    assert not gateway.passes(CONTOSO, "10.1.2.4")
    checked = gateway.agent.portward("check")
    assert f"segment {CONTOSO.segment}: this interface belongs to group {SITE} here" in checked.stdout


@pytest.mark.parametrize(
    ("network", "source"),
    [("10.2.0.4", "10.2.0.4"), ("10.2.1.0/24", "10.2.1.9"), ("2001:db8:78::/64", "2001:db8:78::9")],
)
def test_a_revocation_stops_the_source_behind_each_interface(gateway: Gateway, network: str, source: str) -> None:
    id_ = attach(gateway, SITE, network, ALLOWED)
    assert gateway.passes(CONTOSO, source)
    assert gateway.passes(FABRIKAM, source)
    attach(gateway, SITE, network, DENIED, id_)
    assert cached(gateway, "allow4" if "." in source else "allow6", source) == 0
    assert not gateway.passes(CONTOSO, source)
    assert not gateway.passes(FABRIKAM, source)
    attach(gateway, SITE, network, ALLOWED, id_)
    assert gateway.passes(CONTOSO, source)
    assert gateway.passes(FABRIKAM, source)


def test_a_rate_limit_is_one_for_all_interfaces_and_ends_behind_each(gateway: Gateway) -> None:
    id_ = attach(gateway, SITE, "10.3.0.4", DENIED)
    grant(gateway, id_, RateLimit(per_minute=60, burst=10))
    for tenant in (CONTOSO, FABRIKAM):
        until(lambda tenant=tenant: gateway.passes(tenant, "10.3.0.4"), "a connection passes within the limit")  # type: ignore[misc]
    buckets = limits(gateway)
    assert (len(buckets), len(set(buckets))) == (2, 1), "two sources of one bucket"
    grant(gateway, id_, None, ExemptionState.REVOKED)
    assert limits(gateway) == []
    assert not gateway.passes(CONTOSO, "10.3.0.4", "A")
    assert not gateway.passes(FABRIKAM, "10.3.0.4", "A")


def grant(
    gateway: Gateway, id_: UUID, limit: RateLimit | None, state: ExemptionState = ExemptionState.GRANTED
) -> None:
    """Writes the exemption of a subscription."""
    decided = {"requested": _GRANTED, "decided": _GRANTED, "by": "test", "justification": "mail", "reason": "good"}
    gateway.agent.apply(Exemption(subscription=id_, state=state, limit=limit, **decided))  # type: ignore[arg-type]


def limits(gateway: Gateway) -> list[str]:
    """The name of the limit of each source that has one."""
    with namespaces.inside(gateway.lab.gateway), closing(NfNetlink()) as netlink:
        return [element.object for element in netlink.elements(TABLE, f"{RATE_LIMITS}4")]


def test_packets_are_counted_by_the_group(gateway: Gateway) -> None:
    attach(gateway, SITE, "10.4.0.4", ALLOWED)
    name = f'portward_packets_total{{segment="{SITE}",verdict="allow"}}'
    before = gateway.agent.metrics().get(name, 0)
    for tenant in (CONTOSO, FABRIKAM) * 3:
        assert gateway.passes(tenant, "10.4.0.4")
    until(lambda: gateway.agent.metrics().get(name, 0) == before + 6, "six packets counted")
    metrics = gateway.agent.metrics()
    assert not [one for one in metrics if f'segment="{CONTOSO.segment}"' in one]
    assert metrics["portward_segments"] == 2
    assert metrics[f'portward_group_interfaces{{segment="{SITE}"}}'] >= 2
    status = json.loads(gateway.agent.portward("status", "--json").stdout)
    assert {one["name"]: one["index"] for one in status["segments"]} == {SITE: None, OTHER: None}


# --- interfaces that come and go ---


@contextmanager
def port(gateway: Gateway, name: str) -> Iterator[Port]:
    """An interface of the gateway, whose other end is in a namespace of its own."""
    home = f"{gateway.lab.name}-port"
    namespaces.make(home)
    try:
        namespaces.ip("-n", gateway.lab.gateway, "link", "add", name, "type", "veth",
                      "peer", "name", "eth0", "netns", home)  # fmt: skip
        namespaces.batch(gateway.lab.gateway, [f"link set {name} up"])
        namespaces.batch(home, ["link set eth0 up"])
        yield Port(gateway, home, name)
    finally:
        namespaces.remove(home)


class Port:
    """An interface of the gateway that a test has made."""

    def __init__(self, gateway: Gateway, home: str, name: str) -> None:
        self._gateway, self._home, self.name = gateway, home, name

    def rename(self, name: str) -> None:
        """Gives the interface another name, and waits until the policy table has it."""
        lines = [f"link set {self.name} down", f"link set {self.name} name {name}", f"link set {name} up"]
        namespaces.batch(self._gateway.lab.gateway, lines)
        self.name = name

    def passes(self, source: str) -> bool:
        """Whether a packet that arrives on this interface reaches the Internet side."""
        import socket

        from scapy.layers.l2 import Ether

        packet = segment(source)
        view = Seen(self._gateway.lab.internet)
        with namespaces.inside(self._home):
            out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            out.bind(("eth0", 0))
            out.send(bytes(Ether(dst=link_address(self._gateway.lab.gateway, self.name)) / packet))
            return view.late(same(packet), self._gateway.lab.gateway) is not None
        finally:
            out.close()
            view.close()


def interfaces(gateway: Gateway, group: str) -> int:
    """How many interfaces the agent counts in a group."""
    return int(gateway.agent.metrics()[f'portward_group_interfaces{{segment="{group}"}}'])


def test_a_new_interface_of_a_group_has_the_groups_policy_at_once(gateway: Gateway) -> None:
    id_ = attach(gateway, SITE, "10.5.0.4", ALLOWED)
    attach(gateway, SITE, "10.5.0.5", DENIED)
    with port(gateway, "vni1077") as new:
        until(lambda: new.passes("10.5.0.4"), "the allowed source passes")
        assert not new.passes("10.5.0.5")
        attach(gateway, SITE, "10.5.0.4", DENIED, id_)
        assert not new.passes("10.5.0.4"), "a revocation reaches an interface that came after the start"
        attach(gateway, SITE, "10.5.0.4", ALLOWED, id_)
        assert new.passes("10.5.0.4")
    until(lambda: cached(gateway, "allow4", "10.5.0.4") == 0, "what is cached behind it goes with it")


def test_an_interface_that_moves_to_another_group_has_no_verdict_of_the_first(gateway: Gateway) -> None:
    attach(gateway, SITE, "10.6.0.4", ALLOWED)
    attach(gateway, OTHER, "10.6.0.4", DENIED)
    attach(gateway, OTHER, "10.6.0.6", ALLOWED)
    with port(gateway, "vni1078") as moved:
        until(lambda: moved.passes("10.6.0.4"), "the allowed source passes")
        moved.rename("vni3001")
        until(lambda: interfaces(gateway, OTHER) == 2, "the agent has seen it")
        until(lambda: moved.passes("10.6.0.6"), "the other group's source passes")
        assert not moved.passes("10.6.0.4")
        moved.rename("vni1078")
        until(lambda: moved.passes("10.6.0.4"), "it is back in its group")
        assert not moved.passes("10.6.0.6")


def test_an_interface_that_leaves_its_group_for_no_segment_is_one_like_others(gateway: Gateway) -> None:
    attach(gateway, SITE, "10.7.0.4", ALLOWED)
    # Two, unless an interface of another test has gone a moment ago.
    until(lambda: interfaces(gateway, SITE) == 2, "only the tenants' interfaces are there")
    with port(gateway, "vni1079") as moved:
        until(lambda: moved.passes("10.7.0.4"), "the allowed source passes")
        until(lambda: interfaces(gateway, SITE) == 3, "it is counted")
        moved.rename("wan7")
        until(lambda: interfaces(gateway, SITE) == 2, "the agent has seen it")
        until(lambda: cached(gateway, "allow4", "10.7.0.4") == 0, "nothing of it is cached")


# --- what operators read ---


def test_verbs_take_the_group_and_each_of_its_interfaces(gateway: Gateway) -> None:
    attach(gateway, SITE, "10.8.0.4", ALLOWED)
    assert gateway.passes(FABRIKAM, "10.8.0.4")
    of_group = gateway.agent.explain(SITE, "10.8.0.4")
    assert (of_group["segment"], of_group["verdict"], of_group["remarks"]) == (SITE, "allow", [])
    assert of_group["kernel"].endswith(f"behind {FABRIKAM.segment}")
    here = gateway.agent.explain(FABRIKAM.segment, "10.8.0.4")
    assert (here["segment"], here["interface"]) == (SITE, FABRIKAM.segment)
    assert here["kernel"].startswith("has cached 'allow'")
    assert here["remarks"] == [
        f"{FABRIKAM.segment} belongs to group {SITE}: the policy names the group, and this is what it says"
    ]
    elsewhere = gateway.agent.explain(CONTOSO.segment, "10.8.0.4")
    assert elsewhere["kernel"] == "has cached nothing for this source"
    refused = gateway.agent.portward("explain", "vnix", "10.8.0.4")
    assert (refused.returncode, f"group {SITE} (vni10*)" in refused.stderr) == (2, True)


def test_a_diagnosis_finds_what_was_dropped_behind_any_interface(gateway: Gateway) -> None:
    id_ = attach(gateway, SITE, "10.8.1.4", DENIED)
    for tenant in (CONTOSO, FABRIKAM, FABRIKAM):
        assert not gateway.passes(tenant, "10.8.1.4")
    found = json.loads(gateway.agent.portward("diagnose", str(id_), "--json").stdout)
    [machine] = found["facts"]["machines"]
    assert (machine["segment"], machine["drops"]["refused"], machine["drops"]["sources"]) == (SITE, 3, 1)
    assert found["facts"]["places"] == {SITE: "judges"}
    same_ = json.loads(gateway.agent.portward("diagnose", CONTOSO.segment, "10.8.1.4", "--json").stdout)
    assert same_["facts"]["subscription"]["id"] == str(id_)
    assert same_["remarks"][0].startswith(f"{CONTOSO.segment} belongs to group {SITE}")


def test_status_check_and_top_speak_of_the_group(gateway: Gateway) -> None:
    attach(gateway, SITE, "10.8.2.4", ALLOWED)
    assert gateway.passes(CONTOSO, "10.8.2.4")
    until(lambda: f"segment   {SITE} (2 interfaces): " in gateway.agent.portward("status").stdout, "it is counted")
    checked = gateway.agent.portward("check", "--without-store").stdout
    assert f"segments group {SITE} (vni10*), group {OTHER} (vni2003, vni3*); uplinks up0" in checked
    assert f"group '{SITE}': " in checked
    assert "no such interface" not in checked
    top = gateway.agent.portward("top", "--count", "1")
    assert [line for line in top.stdout.splitlines() if SITE in line.split() and "10.8.2.4" in line], top.stdout


def test_a_group_without_an_interface_is_warned_of(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(groups=[{"name": "calico", "interfaces": ["cali*"]}])
    assert "WARNING: group 'calico': no interface matches cali* now" in gateway.agent.portward("check").stdout
    told = "segment   calico: this group has NO INTERFACE here now"
    until(lambda: told in gateway.agent.portward("status").stdout, "the status has the group")
    assert gateway.agent.metrics()['portward_group_interfaces{segment="calico"}'] == 0  # once: never more
    assert "groups: no interface of group 'calico' (cali*) is there now" in gateway.agent.log.read_text()


def test_a_reload_makes_and_ends_a_group(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    assert gateway.passes(CONTOSO, "10.0.0.4"), "its own attachment counts"
    gateway.agent.configure(segments=[], groups=[GROUPS[0]])
    gateway.agent.reload()
    assert not gateway.passes(CONTOSO, "10.0.0.4")
    attach(gateway, SITE, "10.0.0.4", ALLOWED)
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert gateway.passes(FABRIKAM, "10.0.0.4")
    gateway.agent.configure(segments=["vni*"], groups=[])
    gateway.agent.reload()
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4"), "as its own attachment says"


# --- a large group ---

_MANY = 1_000


def test_a_revocation_reaches_a_thousand_interfaces(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(segments=[], groups=GROUPS)
    namespaces.batch(
        gateway.lab.gateway,
        [f"link add vni10x{number} type veth peer name vni10y{number}" for number in range(_MANY // 2)],
    )
    until(lambda: interfaces(gateway, SITE) == _MANY + 2, "the agent has seen all interfaces")
    ids = [attach(gateway, SITE, network, ALLOWED) for network in ("10.9.0.4", "10.9.1.0/24")]
    assert gateway.passes(CONTOSO, "10.9.0.4")
    assert gateway.passes(FABRIKAM, "10.9.1.4")
    fill(gateway, ["10.9.0.4", "10.9.1.4", "10.9.1.5"])
    for id_, network, sources in zip(
        ids, ("10.9.0.4", "10.9.1.0/24"), (["10.9.0.4"], ["10.9.1.4", "10.9.1.5"]), strict=True
    ):
        began = time.monotonic()
        attach(gateway, SITE, network, DENIED, id_)
        assert time.monotonic() - began < 10
        assert [cached(gateway, "allow4", source) for source in sources] == [0] * len(sources)
    for tenant in (CONTOSO, FABRIKAM):
        assert not gateway.passes(tenant, "10.9.0.4")
        assert not gateway.passes(tenant, "10.9.1.4")


def fill(gateway: Gateway, sources: list[str]) -> None:
    """Caches that these sources may send, behind each interface of the gateway's first group."""
    with namespaces.inside(gateway.lab.gateway), closing(NfNetlink()) as netlink:
        import socket

        indexes = [index for index, name in socket.if_nameindex() if name.startswith("vni10")]
        keys = [Source(index, ip_address(source).packed).key for index in indexes for source in sources]
        KernelElements(netlink).commit([Add("allow4", keys)])
    assert cached(gateway, "allow4", sources[0]) == len(indexes)
