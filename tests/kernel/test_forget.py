"""A change of prefixes deletes the cached verdicts that it affects, and no others, on real sets whose elements
expire."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from kernel.conftest import lab_name
from portward.base.netlink import attribute, nest, string
from portward.config.keys import Config, Verdicts
from portward.dataplane import xtables
from portward.dataplane.desired import Desired
from portward.dataplane.elements import Add, Delete, RefusedError
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.rate_limits import Bucket, RateLimits
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.sync import KernelSync
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.lab import namespaces
from portward.lab.agent import until
from portward.policy import presets
from portward.table.commits import ChangedPlace, Committed

_LINKS = {"vni1": (11,), "vni2": (12,)}
_CACHE_SETS = ("allow", "deny", "observed", "refused", "unknown")


class Forgetting:
    """Ruleset, sets and KernelSync in the calling thread's network namespace."""

    def __init__(self, **verdicts: Any) -> None:
        self.netlink = NfNetlink()
        self.nft = Nft(self.netlink, compiles=False)
        self.kernel = KernelElements(self.netlink)
        self.cache, self.rate_limits = VerdictCache(self.kernel), RateLimits(self.kernel)
        config = Config(segments=("vni*",), uplinks=("up0",), verdicts=Verdicts(**verdicts))
        preset, native = presets.load("azure-2020"), xtables.has_native_queue(self.nft)

        self.reconciler = RulesetReconciler(self.nft, self.netlink, self.cache)
        self.sync = KernelSync(self.reconciler, self.cache, self.rate_limits, lambda sources: None, native=native)
        self._desired = Desired(config, preset, 1, 1, _LINKS)
        self.sync.apply(self._desired)
        self.generation = 1

    def change(self, *prefixes: str, segment: str = "vni1", links: frozenset[int] = frozenset()) -> None:
        self.generation += 1
        places = tuple(ChangedPlace(segment, ip_network(prefix)) for prefix in prefixes)
        self._desired = self._desired._replace(generation=self.generation, revision=self.generation)
        self.sync.apply(self._desired, Committed(self.generation, self.generation, places, links))
        assert self.sync.broken == ""
        assert self.cache.synced() == self.generation

    def cached(self, set_: str) -> set[bytes]:
        return {key for key, _, _ in self.kernel.rows(set_)}

    def brief(self, set_: str, keys: list[bytes], milliseconds: int) -> None:
        """Adds elements that expire after so few milliseconds."""
        set_name = attribute(1, string("portward")) + attribute(2, string(set_))
        timeout = attribute(4, struct.pack(">Q", milliseconds))
        for start in range(0, len(keys), 1_000):
            part = b"".join(nest(1, nest(1, attribute(1, key)) + timeout) for key in keys[start : start + 1_000])
            self._commit([(12, set_name + nest(3, part))])

    def _commit(self, messages: list[tuple[int, bytes]]) -> None:
        """Commits messages. The kernel enlarges a set's hash table some time after it has become necessary, and
        refuses further elements with EBUSY until then, so this tries again."""

        def taken() -> bool:
            try:
                with self.netlink.committing():
                    self.netlink.commit(messages)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                return False
            return True

        until(taken, "the set takes elements")


@pytest.fixture
def make() -> Iterator[Callable[..., Forgetting]]:
    """Makes a `Forgetting`. The whole test runs inside a namespace, because nft opens a socket for each ruleset
    that it loads or lists."""
    name = lab_name()
    namespaces.make(name)
    try:
        with namespaces.inside(name):
            yield Forgetting
    finally:
        namespaces.remove(name)


def key(address: str, number: int = 0, link: int = 11) -> bytes:
    return Source(link, (ip_address(address) + number).packed).key


@pytest.mark.parametrize(
    ("family", "prefix", "inside", "outside"),
    [("4", "10.1.0.0/20", "10.1.3.0", "10.2.0.0"), ("6", "2001:db8:1::/64", "2001:db8:1::", "2001:db8:2::")],
)
def test_revoked_prefixes_go_and_other_tenants_stay(
    make: Callable[..., Forgetting], family: str, prefix: str, inside: str, outside: str
) -> None:
    here = make()
    go = [key(inside, number) for number in range(1_000)]
    stay = [key(outside, number) for number in range(3_000)] + [key(inside, number, 12) for number in range(3_000)]
    for name in _CACHE_SETS:
        here.kernel.commit([Add(name + family, go + stay)])
    repairs = here.reconciler.repairs
    here.change(prefix)
    for name in _CACHE_SETS[:3]:  # the others expire within seconds
        assert here.cached(name + family) == set(stay), name
    for name in _CACHE_SETS:
        assert here.cached(name + family) <= set(stay), name
    assert (here.reconciler.repairs, here.reconciler.intact()) == (repairs, True), (
        "our own transactions are known as ours"
    )


def test_an_interface_that_is_gone_takes_its_verdicts_with_it(make: Callable[..., Forgetting]) -> None:
    here = make()
    for family, address in (("4", "10.1.0.0"), ("6", "2001:db8::")):
        keys = [key(address, number, link) for number in range(1_000) for link in (11, 12)]
        here.kernel.commit([Add("allow" + family, keys), Add("deny" + family, keys)])
    here.change(links=frozenset({11}))
    for name in ("allow4", "allow6", "deny4", "deny6"):
        assert {Source.of(found).link for found in here.cached(name)} == {12}


@pytest.mark.parametrize("prefix", ["2001:db8:1::/64", "2001:db8:1::5/128"])
def test_a_full_set_loses_what_is_revoked_and_nothing_else(make: Callable[..., Forgetting], prefix: str) -> None:
    here = make(sources=2_000)
    go, stay = [key("2001:db8:1::", 5)], [key("2001:db8:2::", number) for number in range(1_999)]
    for name in ("allow6", "deny6", "observed6"):
        here.kernel.commit([Add(name, go + stay)])
    with pytest.raises(RefusedError, match="Too many open files"):  # ENFILE: it is full
        here.kernel.commit([Add("allow6", [key("2001:db8:3::")])])
    here.change(prefix)
    for name in ("allow6", "deny6", "observed6"):
        assert here.cached(name) == set(stay)


def test_elements_that_expire_meanwhile_stop_no_revocation(make: Callable[..., Forgetting]) -> None:
    """In each change some elements expire between reading and deleting."""
    here = make()
    stay = {key("2001:db8:2::", number) for number in range(200)}
    here.kernel.commit([Add("allow6", list(stay))])
    for number in range(30):
        brief = [key("2001:db8:1::", place) for place in range(3_000)]
        here.brief("allow6", brief[:1_500], 20 + number)
        here.brief("allow6", brief[1_500:], 60_000)
        here.change("2001:db8:1::/64")
        assert here.cached("allow6") == stay


def test_no_revoked_source_is_left_while_the_kernel_collects(make: Callable[..., Forgetting]) -> None:
    """While the kernel collects expired elements, a reading misses hundreds of revoked sources. That happens in
    about one of twenty readings."""
    here = make()
    revoked = [key("2001:db8:1::", number) for number in range(10_000)]
    stay = [key("2001:db8:2::", number) for number in range(20_000)]
    here.kernel.commit([Add("allow6", stay)])
    ends = time.monotonic() + 12
    number = 0
    while time.monotonic() < ends:
        here.kernel.commit([Add("allow6", revoked)])
        here.brief("allow6", [key("2001:db8:ffff::", number + place) for place in range(1_000)], 700)
        number += 1_000
        here.change("2001:db8:1::/64")
        # Ask for each source by its key, because a reading may miss it.
        for place in range(0, len(revoked), 50):
            assert here.kernel.element("allow6", revoked[place]) is None
    assert here.kernel.element("allow6", stay[0]) is not None


def test_a_rate_limit_goes_with_its_source(make: Callable[..., Forgetting]) -> None:
    here = make()
    inside, outside = (Source.of(key(address)) for address in ("2001:db8:1::", "2001:db8:2::"))
    here.rate_limits.add({inside: Bucket(1, 60, 7), outside: Bucket(2, 30, 3)})
    listing = here.nft.listing("inet portward")
    assert "rate 60/minute burst 7 packets" in listing
    here.change("2001:db8:1::/64")
    assert RateLimits.sources_in_kernel(here.kernel) == {outside: Bucket(2, 30, 3)}
    assert list(here.rate_limits.sources()) == [outside]
    here.rate_limits.delete_unused(lambda bucket: False)
    assert here.kernel.limits() == ["s2-30-3"]


def test_a_delete_of_what_is_not_there_changes_nothing(make: Callable[..., Forgetting]) -> None:
    here = make()
    here.kernel.commit([Add("allow6", [key("2001:db8::1")])])
    with pytest.raises(RefusedError) as raised:
        here.kernel.commit([Delete("allow6", [key("2001:db8::1"), key("2001:db8::2")])])
    assert raised.value.errno == 2
    assert here.cached("allow6") == {key("2001:db8::1")}
