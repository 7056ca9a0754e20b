"""A gateway on which other programs change their own nftables all the time. The agent must work without waiting
until they pause."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from kernel.conftest import ALLOWED, Gateway, lab_name, running_gateway
from kernel.foreign import crowd, traffic
from portward.base.netlink import attribute, string
from portward.config.keys import Config
from portward.dataplane import compiled, ruleset, templates
from portward.dataplane.desired import NOTHING
from portward.dataplane.names import FIXED_SETS, TABLE, KernelTable
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.reconciler import RulesetReconciler, hearing
from portward.dataplane.ruleset import State, Wanted
from portward.dataplane.verdict_cache import VerdictCache
from portward.errors import KernelError
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM
from portward.policy import presets

CONFIG = Config(segments=("vni*", "tap?"), uplinks=("up0",))
AZURE = presets.load("azure-2020")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway on which another program makes 200 changes a second, also while the agent starts."""
    place = running_gateway(tmp_path_factory.mktemp("foreign"))
    gateway = place.__enter__()
    try:
        gateway.agent.stop()
        namespaces.run(gateway.lab.gateway, ["nft", "delete", "table", "inet", TABLE])
        with traffic(gateway.lab.gateway) as process:
            gateway.agent.start()
            yield gateway
            assert process.poll() is None, "it changed something all the time"
    finally:
        place.__exit__()


def test_the_agent_starts_and_enforces(crowded: Gateway) -> None:
    assert crowded.passes(CONTOSO, "10.0.0.4")
    assert not crowded.passes(FABRIKAM, "10.0.0.4")
    until(lambda: crowded.agent.metrics()["portward_ruleset_broken"] == 0, "nothing is broken")


def test_new_sources_get_verdicts_and_a_revocation_is_enforced(crowded: Gateway) -> None:
    for number in range(1, 6):
        crowded.source(CONTOSO, f"10.0.7.{number}", ALLOWED)
        assert crowded.passes(CONTOSO, f"10.0.7.{number}")
        assert not crowded.passes(CONTOSO, f"10.0.8.{number}")


@pytest.mark.parametrize(
    "damage",
    [
        f"delete table inet {TABLE}",
        f"flush chain inet {TABLE} screen",
        f"insert rule inet {TABLE} screen accept",
        f"flush set inet {TABLE} internal4",
        f"add table inet {TABLE} {{ flags dormant; }}",
    ],
)
def test_damage_is_repaired_within_a_second(crowded: Gateway, damage: str) -> None:
    with namespaces.inside(crowded.lab.gateway):
        netlink = NfNetlink()
    try:
        before = netlink.fingerprint(TABLE, FIXED_SETS)
        assert before is not None
        repairs = crowded.agent.metrics()["portward_ruleset_repairs_total"]
        namespaces.load(crowded.lab.gateway, damage)
        until(lambda: unchanged(netlink, before), "the ruleset is back", seconds=1)
        until(lambda: crowded.agent.metrics()["portward_ruleset_repairs_total"] == repairs + 1, "it is counted")
        assert crowded.passes(CONTOSO, "10.0.0.4")
        assert not crowded.passes(FABRIKAM, "10.0.0.4")
    finally:
        netlink.close()


def unchanged(netlink: NfNetlink, before: bytes) -> bool:
    """Whether the ruleset is as it was."""
    return netlink.fingerprint(TABLE, FIXED_SETS) == before


def test_nothing_is_repaired_without_damage(crowded: Gateway) -> None:
    before = crowded.agent.metrics()
    # The agent checks the ruleset at least every ten seconds.
    time.sleep(11)  # pause: one check
    after = crowded.agent.metrics()
    assert after["portward_ruleset_repairs_total"] == before["portward_ruleset_repairs_total"]
    assert (
        after['portward_divergence_total{kind="ruleset"}'] == before['portward_divergence_total{kind="ruleset"}']
    )


def test_a_chain_that_translates_loads_the_guard(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        place = gateway.lab.gateway
        namespaces.run(place, ["nft", "delete", "table", "inet", "lab"])
        until(lambda: gateway.agent.metrics()["portward_guard_loaded"] == 0, "no guard without a reason")
        with traffic(place):
            namespaces.load(place, "table ip nat { chain pre { type nat hook prerouting priority -100; }; }")
            until(lambda: gateway.agent.metrics()["portward_guard_loaded"] == 1, "the guard")
            namespaces.load(place, "delete table ip nat")
            until(lambda: gateway.agent.metrics()["portward_guard_loaded"] == 0, "the guard goes", seconds=15)


# --- the ruleset as libnftables compiles it ---


@pytest.fixture
def namespace() -> Iterator[str]:
    """An empty network namespace. The test's own thread is in it."""
    name = lab_name()
    namespaces.make(name)
    with namespaces.inside(name):
        yield name
    namespaces.remove(name)


def want(generation: int = 9, *, guard: bool = True, stacked: frozenset[int] = frozenset((1,))) -> Wanted:
    """A ruleset with all its parts."""
    state = State(generation, synced=True, unsettled=frozenset((77,)))
    around = NOTHING._replace(guard=guard, stacked=stacked)
    return ruleset.wanted(templates.read(), CONFIG, AZURE, native=False, state=state, surroundings=around)


def listing(namespace: str) -> str:
    """Everything in the namespace, as nft lists it."""
    return namespaces.run(namespace, ["nft", "-s", "list", "ruleset"]).stdout


def test_what_is_compiled_is_what_libnftables_loads(namespace: str) -> None:
    netlink = NfNetlink()
    direct, compiling = Nft(), Nft(netlink)
    wanted = want()
    direct.replace("", wanted)
    expected, print_ = listing(namespace), netlink.fingerprint(TABLE, FIXED_SETS)
    direct.load(f"delete table inet {TABLE}\n")
    compiling.replace("", wanted)
    assert compiling.compiles
    assert listing(namespace) == expected
    assert netlink.fingerprint(TABLE, FIXED_SETS) == print_
    compiling.delete(str(KernelTable.INET))
    assert listing(namespace) == ""
    netlink.close()


def test_tables_of_others_stay_when_ours_is_compiled(namespace: str) -> None:
    """Also a table of family arp, although the line that keeps libnftables from fetching rules names that
    family."""
    namespaces.load(namespace, "table arp theirs {\n chain a {\n }\n}\ntable ip theirs {\n chain b {\n }\n}\n")
    before = listing(namespace)
    netlink = NfNetlink()
    nft = Nft(netlink)
    nft.replace("", want())
    nft.delete(str(KernelTable.INET))
    assert listing(namespace) == before
    netlink.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("table inet portward {\n chain a {\n  tcp dprt 25\n }\n}\n", "syntax error"),
        ("table inet portward {\n chain a {\n  iif @nowhere drop\n }\n}\n", "No such file"),
        ("table inet portward {\n chain a {\n  tcp dport 65536\n }\n}\n", "Service out of range"),
    ],
)
def test_a_text_with_a_mistake_is_refused_and_changes_nothing(namespace: str, text: str, words: str) -> None:
    netlink = NfNetlink()
    nft = Nft(netlink)
    with pytest.raises(KernelError, match=words):
        nft.add(text)
    assert listing(namespace) == ""
    assert nft.compiles
    netlink.close()


def test_a_refusal_names_what_the_kernel_refuses(namespace: str) -> None:
    netlink = NfNetlink()
    nft = Nft(netlink)
    namespaces.load(namespace, "table inet portward {\n set s { type ipv6_addr; }\n}\n")
    with pytest.raises(KernelError, match=r"File exists \(set s\)"):
        nft.add("table inet portward {\n set s { type ipv4_addr; }\n}\n")
    netlink.close()


def test_a_libnftables_that_prints_otherwise_loads_by_itself(
    namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a newer libnftables prints another format, it loads the rulesets itself. That is slower beside other
    programs, but enforces as well."""
    monkeypatch.setattr(compiled, "_ROW", compiled._COLOUR)
    netlink = NfNetlink()
    nft = Nft(netlink)
    nft.replace("", want())
    assert not nft.compiles
    assert "chain screen" in listing(namespace)
    assert "libnftables loads the rulesets itself" in caplog.text
    netlink.close()


# --- load, check and repair while others make many more changes, and beside a large ruleset ---


class Place:
    """The parts of the agent that load and watch the ruleset, in the calling thread's namespace."""

    def __init__(self) -> None:
        self.netlink = NfNetlink()
        self.nft = Nft(self.netlink)
        self.notices = hearing(lambda: (self.netlink.port,))
        cache = VerdictCache(KernelElements(self.netlink))
        self.reconciler = RulesetReconciler(self.nft, self.netlink, cache, self.notices.read)

    def close(self) -> None:
        """Closes the sockets."""
        self.notices.close()
        self.netlink.close()


@pytest.fixture
def place(namespace: str) -> Iterator[Place]:
    """These parts in the empty namespace."""
    found = Place()
    yield found
    found.close()


@pytest.mark.parametrize("rate", [200, 2_000])
def test_a_load_is_done_at_the_first_try_and_stays(namespace: str, place: Place, rate: int) -> None:
    with traffic(namespace, rate):
        for generation in range(1, 21):
            place.reconciler.load(want(generation))
            assert place.reconciler.intact()
    assert place.reconciler.repairs == 0


def test_a_chain_that_comes_right_behind_our_load_is_no_part_of_it(
    namespace: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint after a load must be that of the loaded ruleset, without another program's change since
    then."""
    real, times = place.netlink.fingerprint, list[int]()

    def late(table: str, sets: tuple[str, ...]) -> bytes | None:
        if table == TABLE and not times:
            times.append(1)
            namespaces.load(namespace, f"insert rule inet {TABLE} screen accept")
        return real(table, sets)

    monkeypatch.setattr(place.netlink, "fingerprint", late)
    with traffic(namespace):
        place.reconciler.load(want())
    assert times
    rules = namespaces.run(namespace, ["nft", "-s", "list", "chain", "inet", TABLE, "screen"]).stdout
    assert "\t\taccept\n" not in rules
    assert place.reconciler.intact()


def test_damage_shows_behind_any_number_of_changes_of_others(namespace: str, place: Place) -> None:
    place.reconciler.load(want())
    with traffic(namespace):
        assert place.reconciler.intact()
        namespaces.load(namespace, f"flush chain inet {TABLE} screen")
        assert not place.reconciler.intact()
        place.reconciler.repair(want())
        assert place.reconciler.intact()


def test_a_reading_that_others_interrupt_is_no_damage(
    namespace: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted reading is repeated, and damage is still found."""
    place.reconciler.load(want())
    namespaces.load(namespace, f"add chain inet {TABLE} extra\ndelete chain inet {TABLE} extra")

    def interrupted(*_: object) -> bytes:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(place.netlink, "fingerprint", interrupted)
        assert place.reconciler.intact()
        assert not place.reconciler.at_rest(place.netlink)
    assert place.reconciler.intact()
    namespaces.load(namespace, f"flush chain inet {TABLE} screen")
    assert not place.reconciler.intact()


@pytest.mark.parametrize("family", ["ip", "inet"])
def test_a_large_ruleset_of_others_that_changes_keeps_no_load(namespace: str, place: Place, family: str) -> None:
    """libnftables itself would read the 20,000 chains again after each change, and never finish."""
    crowd(namespace, 20_000, 100_000, family)
    with traffic(namespace):
        for generation in range(1, 4):
            place.reconciler.load(want(generation))
            assert place.reconciler.intact()
        namespaces.load(namespace, f"add chain inet {TABLE} extra")
        until(lambda: not place.reconciler.intact(), "the damage shows")
        place.reconciler.repair(want())


def test_the_devices_above_segments_are_closed_before_the_ruleset_is_loaded(namespace: str, place: Place) -> None:
    place.reconciler.load(want(stacked=frozenset()))
    text = ruleset.stacked_alone(templates.read(), CONFIG, AZURE, NOTHING._replace(stacked=frozenset((1,))))
    sets = namespaces.run(namespace, ["nft", "list", "set", "inet", TABLE, "internal4"]).stdout
    with traffic(namespace):
        place.reconciler.add(text)
    assert "stacked" in place.netlink.hooks(TABLE)
    assert namespaces.run(namespace, ["nft", "list", "set", "inet", TABLE, "internal4"]).stdout == sets


def test_a_set_of_ours_that_others_fill_is_heard_of(namespace: str, place: Place) -> None:
    place.reconciler.load(want())
    body = attribute(1, string(TABLE)) + attribute(3, string(f"x{uuid4().hex}"))
    other = NfNetlink()
    other.commit([(3, body)])
    other.close()
    assert not place.reconciler.intact()


def test_a_libnftables_that_prints_otherwise_for_one_text_alone_enforces_as_well(
    place: Place, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then libnftables uses a socket of its own, so the monitor takes its transactions for another program's."""
    place.reconciler.load(want())
    monkeypatch.setattr(compiled, "_ROW", compiled._COLOUR)
    place.reconciler.load(want(stacked=frozenset()))
    assert not place.nft.compiles
    assert place.reconciler.intact()
    assert place.reconciler.at_rest(place.netlink)
    namespaces.load(namespace, f"flush chain inet {TABLE} screen")
    assert not place.reconciler.at_rest(place.netlink)
    assert not place.reconciler.intact()
    place.reconciler.repair(want(stacked=frozenset()))
    assert place.reconciler.intact()
