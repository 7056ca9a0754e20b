"""Interface groups on a fake kernel: a change of an address reaches what is cached behind each interface of its
group, in one transaction if it is small, and by one search if it is large."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest

from portward.config.keys import Config, InterfaceGroup, Verdicts
from portward.dataplane import reach as module
from portward.dataplane import ruleset, templates
from portward.dataplane.desired import NOTHING
from portward.dataplane.fake import FakeKernel
from portward.dataplane.names import RATE_LIMITS, TABLE
from portward.dataplane.rate_limits import Bucket
from portward.dataplane.reach import reach
from portward.dataplane.verdict_cache import Source
from portward.ipc.mark import Class
from portward.model import Mode
from unit.dataplane.grounds import LINK, PRESET, SEGMENT, Plane, committed, source, words

GROUP, OTHER = "calico", "acme"
BEHIND, ELSEWHERE = (11, 12, 13), (21, 22)
CONFIG = Config(
    segments=("vni*",),
    uplinks=("up0",),
    groups=(
        InterfaceGroup(name=GROUP, interfaces=("cali*",)),
        InterfaceGroup(name=OTHER, interfaces=("eth2", "eth3")),
    ),
)
BUCKET = Bucket(5, 10, 2)


def behind(links: Iterable[int], *addresses: str) -> set[Source]:
    """Sources behind interfaces."""
    return {source(address, link) for link, address in product(links, addresses)}


ALL = {*behind(BEHIND, "10.0.0.4", "10.0.0.5", "2001:db8::4"), *behind(ELSEWHERE, "10.0.0.4"), source("10.0.0.4")}


@pytest.fixture
def plane() -> Plane:
    """A gateway that enforces generation 1, and has cached that every source may send."""
    found = Plane(FakeKernel(), config=CONFIG)
    found.links = {SEGMENT: (LINK,), GROUP: BEHIND, OTHER: ELSEWHERE, "empty": ()}
    found.start()
    assert found.learn(Class.ALLOW, *ALL)
    found.kernel.journal.clear()
    return found


@pytest.fixture(params=["written out", "searched"])
def _searched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of groups are written out for each interface, or are searched for."""
    if request.param == "searched":
        monkeypatch.setattr(module, "_WRITTEN_OUT", 2)


CHANGES = {
    "an address": (["10.0.0.4/32"], behind(BEHIND, "10.0.0.4")),
    "an address of IPv6": (["2001:db8::4/128"], behind(BEHIND, "2001:db8::4")),
    "two addresses": (["10.0.0.4/32", "2001:db8::4/128"], behind(BEHIND, "10.0.0.4", "2001:db8::4")),
    "a prefix": (["10.0.0.0/24"], behind(BEHIND, "10.0.0.4", "10.0.0.5")),
    "an odd prefix": (["10.0.0.4/31"], behind(BEHIND, "10.0.0.4", "10.0.0.5")),
    "a prefix and an address": (
        ["10.0.0.0/24", "2001:db8::4/128"], behind(BEHIND, "10.0.0.4", "10.0.0.5", "2001:db8::4"),
    ),
    "an address of no source": (["10.7.7.7/32"], set()),
}  # fmt: skip


@pytest.mark.usefixtures("_searched")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_reaches_each_interface_of_the_group_and_no_other(plane: Plane, name: str) -> None:
    networks, gone = CHANGES[name]
    plane.enforce(committed(2, *networks, segment=GROUP))
    assert plane.cached().keys() == ALL - gone
    assert plane.cache.synced() == 2
    assert not plane.sync.broken


@pytest.mark.usefixtures("_searched")
def test_nothing_of_the_group_passes_if_the_process_dies_after_the_revocation(plane: Plane) -> None:
    """The last write says that the change is complete, so it must not come before those of all interfaces."""
    plane.enforce(committed(2, "10.0.0.4/32", segment=GROUP))
    stages = plane.kernel.journal
    synced = [number for number, one in enumerate(words(stages)) if "add synced 2" in one]
    assert synced == [len(stages) - 1]


def test_an_address_of_a_small_group_takes_two_transactions(plane: Plane) -> None:
    plane.enforce(committed(2, "10.0.0.4/32", segment=GROUP))
    assert words(plane.kernel.journal) == [
        "flush epoch, add epoch 2, add recent 1",
        "forget 11 . 10.0.0.4 12 . 10.0.0.4 13 . 10.0.0.4, flush synced, add synced 2",
    ]


def test_a_group_without_an_interface_here_is_reached_by_nothing(plane: Plane) -> None:
    plane.enforce(committed(2, "10.0.0.4/32", "10.0.0.0/24", segment="empty"))
    assert plane.cached().keys() == ALL
    assert plane.cache.synced() == 2


def test_an_interface_that_leaves_its_group_is_forgotten_as_a_whole(plane: Plane) -> None:
    plane.links = {**plane.links, GROUP: BEHIND[1:]}
    plane.enforce(committed(2, links=[BEHIND[0]]))
    assert plane.cached().keys() == ALL - behind(BEHIND[:1], "10.0.0.4", "10.0.0.5", "2001:db8::4")


def test_many_addresses_of_a_large_group_are_one_search() -> None:
    """20,000 addresses behind 1,000 interfaces would be 20 million sources."""
    links = {GROUP: tuple(range(1, 1_001)), SEGMENT: (2_000,)}
    changed = [f"10.0.{number // 256}.{number % 256}/32" for number in range(20_000)]
    found = reach(links, committed(2, *changed, segment=GROUP))
    assert (found.single, found.grouped, len(found.prefixes)) == ([], [], 20_000)
    alone = reach(links, committed(2, *changed))
    assert (len(alone.single), alone.grouped, len(alone.prefixes)) == (20_000, [], 0)


# --- rate limits ---


@pytest.mark.usefixtures("_searched")
def test_a_limit_is_written_again_behind_the_interfaces_where_its_source_was_met(plane: Plane) -> None:
    met, other = source("10.0.0.9", 12), source("10.0.0.9", 11)
    plane.limits = {met: BUCKET, other: BUCKET}
    plane._rate([met])
    plane.enforce(committed(2, "10.0.0.9/32", segment=GROUP))
    assert limited(plane) == {met}, "there is no room for each source behind each interface"
    plane.limits = {}
    plane.enforce(committed(3, "10.0.0.9/32", segment=GROUP))
    assert limited(plane) == set()


def test_a_source_of_a_segment_with_one_interface_has_its_limit_at_once(plane: Plane) -> None:
    plane.limits = {source("10.0.0.9"): BUCKET}
    plane.enforce(committed(2, "10.0.0.9/32"))
    assert limited(plane) == {source("10.0.0.9")}


def limited(plane: Plane) -> set[Source]:
    """The sources that draw on a limit in the kernel."""
    return {Source.of(key) for key in plane.kernel.tables[TABLE].sets[f"{RATE_LIMITS}4"].elements}


# --- the ruleset ---


def text(config: Config) -> str:
    """The ruleset of a configuration."""
    state = ruleset.State(1, synced=False)
    return ruleset.wanted(templates.read(), config, PRESET, native=True, state=state, surroundings=NOTHING).whole


def defined(config: Config, name: str) -> str:
    """The value of a definition in the ruleset of a configuration."""
    [line] = [line for line in text(config).splitlines() if line.startswith(f"define {name} = ")]
    return line.partition(" = ")[2]


def test_the_interfaces_of_groups_are_segments_of_the_ruleset() -> None:
    assert defined(CONFIG, "SEGMENTS") == '{ "vni*", "cali*", "eth2", "eth3" }'
    assert defined(CONFIG, "OBSERVED_SEGMENTS") == '{ "no interface" }'
    everything = Config(segments=(), uplinks=("up0",), groups=CONFIG.groups, mode=Mode.OBSERVE)
    assert defined(everything, "SEGMENTS") == defined(everything, "OPEN_SEGMENTS") == '{ "cali*", "eth2", "eth3" }'


def test_a_group_is_observed_with_all_its_interfaces() -> None:
    config = Config(
        segments=("vni*",), uplinks=("up0",), groups=CONFIG.groups, verdicts=Verdicts(observe=(OTHER, "vni7"))
    )
    assert defined(config, "OBSERVED_SEGMENTS") == '{ "eth2", "eth3", "vni7" }'
    assert "chain unknown_interface" in text(config)


def test_if_all_groups_are_observed_mail_of_unknown_interfaces_passes() -> None:
    observed = Config(
        segments=(), uplinks=("up0",), groups=CONFIG.groups, verdicts=Verdicts(observe=(GROUP, OTHER))
    )
    assert "unknown_interface drop" not in text(observed)
