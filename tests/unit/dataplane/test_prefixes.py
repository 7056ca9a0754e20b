"""The keys in a list of prefixes are the same as by `ipaddress`, and are found with one step for each length."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from portward.dataplane.prefixes import Prefixes
from portward.dataplane.verdict_cache import Source
from portward.model import Address, Network

_LINKS = st.integers(1, 3) | st.integers(1, 2**31 - 1)


@st.composite
def addresses(draw: st.DrawFn, version: int) -> Address:
    """Addresses, many of which share their beginnings."""
    bits = 32 if version == 4 else 128
    number = draw(
        st.integers(0, 2**bits - 1) | st.sampled_from([0, 1, 2 ** (bits - 1), 2**bits - 1, 10 << (bits - 8)])
    )
    return ip_address(number.to_bytes(bits // 8, "big"))


@st.composite
def networks(draw: st.DrawFn, version: int) -> Network:
    """Prefixes of all lengths."""
    address = draw(addresses(version))
    return ip_network((address, draw(st.integers(0, address.max_prefixlen))), strict=False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[int, Network]], list[tuple[int, Address]]]:
    version = draw(st.sampled_from([4, 6]))
    places = draw(st.lists(st.tuples(_LINKS, networks(version) | networks(10 - version)), max_size=12))
    sources = draw(st.lists(st.tuples(_LINKS, addresses(version)), max_size=12))
    # Sources at both ends of the prefixes, and right beside them.
    for link, network in places:
        if network.version == version:
            first, last = int(network.network_address), int(network.broadcast_address)
            for number in (first - 1, first, last, last + 1):
                if 0 <= number < 2**network.max_prefixlen:
                    sources.append((link, ip_address(number.to_bytes(network.max_prefixlen // 8, "big"))))
    return places, sources


@given(cases(), st.lists(_LINKS, max_size=2))
def test_the_keys_found_are_those_in_the_prefixes(
    case: tuple[list[tuple[int, Network]], list[tuple[int, Address]]], links: list[int]
) -> None:
    places, sources = case
    prefixes = Prefixes()
    for link, network in places:
        prefixes.add((link,), network)
    for link in links:
        prefixes.add_link(link)
    want = {
        Source(link, address.packed).key
        for link, address in sources
        if link in links
        or any(link == at and address.version == net.version and address in net for at, net in places)
    }
    keys = [Source(link, address.packed).key for link, address in sources]
    found = prefixes.among("4" if keys and len(keys[0]) == 8 else "6", keys)
    assert found == want


def test_single_sources_are_prefixes_of_full_length() -> None:
    prefixes = Prefixes()
    here, there = (Source(link, ip_address("2001:db8::1").packed).key for link in (2, 3))
    prefixes.add_source(here)
    assert prefixes.among("6", [here, there]) == {here}


def test_a_family_without_prefixes_is_not_named() -> None:
    prefixes = Prefixes()
    assert (prefixes.families(), len(prefixes)) == ("", 0)
    prefixes.add((2,), ip_network("2001:db8::/61"))
    assert (prefixes.families(), len(prefixes)) == ("6", 1)
    prefixes.add_link(3)
    assert (prefixes.families(), len(prefixes)) == ("46", 2)


def test_the_prefixes_of_a_group_are_behind_each_of_its_interfaces_and_no_other() -> None:
    prefixes = Prefixes()
    prefixes.add((2, 3, 5), ip_network("10.0.0.0/24"))
    prefixes.add((2, 3, 5), ip_network("10.0.1.4/31"))
    prefixes.add((7, 8), ip_network("10.0.0.0/24"))
    prefixes.add_source(Source(3, ip_address("10.9.9.9").packed).key)
    prefixes.add_link(9)
    addresses = ("10.0.0.9", "10.0.1.5", "10.0.1.6", "10.9.9.9")
    keys = [Source(link, ip_address(one).packed).key for link in range(1, 10) for one in addresses]
    found = {(one.link, str(ip_address(one.address))) for one in map(Source.of, prefixes.among("4", keys))}
    assert found == {
        *((link, address) for link in (2, 3, 5) for address in ("10.0.0.9", "10.0.1.5")),
        *((link, "10.0.0.9") for link in (7, 8)),
        (3, "10.9.9.9"),
        *((9, address) for address in addresses),
    }
    assert prefixes.links == {2, 3, 5, 7, 8, 9}
    assert len(prefixes) == 5


def test_a_prefix_of_a_large_group_is_one_beginning() -> None:
    prefixes = Prefixes()
    for number in range(100):
        prefixes.add(range(1, 1_001), ip_network((0x0A000000 + number, 32)))
    assert sum(map(len, prefixes._bytes["4"].values())) == 100
    assert len(prefixes.links) == 1_000
