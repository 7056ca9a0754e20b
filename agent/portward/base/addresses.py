"""Reads addresses as people write them, for every verb in the same way.

A program with an IPv6 socket logs 10.0.0.4 as `::ffff:10.0.0.4` (RFC 4291, 2.5.5.2), and no packet has such a
source (RFC 4038, 4.2). So that text means 10.0.0.4 here. A prefix of such addresses is refused, because it is
unclear whether IPv4 is meant.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from portward.errors import InputError
from portward.model import Address, Network

# ::ffff:0:0/96
_MAPPED_BITS = 96
# Messages quote a text up to this length, in characters.
_LONGEST = 100
_LEADING_ZERO = re.compile(r"^(?=[0-9.]+$)(?:.*\.)?0[0-9]")


def parse_address(text: str, field: str) -> Address:
    """The address that `text` means. Raises InputError with `field` and what would be right."""
    try:
        address = ip_address(text)
    except ValueError:
        raise InputError(f"{text[:_LONGEST]!r} is no IPv4 or IPv6 address{_hint(text)}", field=field) from None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            problem = f"{text[:_LONGEST]!r} has a zone: leave it out, the segment says which one"
            raise InputError(problem, field=field)
        return address.ipv4_mapped or address
    return address


def is_address(text: str) -> bool:
    """Whether a text is an IPv4 or IPv6 address."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def unmapped(network: Network) -> Network:
    """The network; an IPv4-mapped IPv6 address as the IPv4 address. Raises ValueError for a prefix of such
    addresses."""
    if not isinstance(network, IPv6Network) or network.prefixlen < _MAPPED_BITS:
        return network
    mapped = network.network_address.ipv4_mapped
    if mapped is None:
        return network
    right = IPv4Network((mapped, network.prefixlen - _MAPPED_BITS))
    if network.prefixlen < network.max_prefixlen:
        # Not `str(network)`, because Python 3.13 changed how it writes such an address.
        written = f"::ffff:{mapped}/{network.prefixlen}"
        raise ValueError(f"{written} is an IPv4 prefix within IPv6: {right} would be right")
    return right


def _hint(text: str) -> str:
    """The end of an error text that names a mistake which is easy to overlook. `010` is 8 to some programs and 10
    to others, so no address is suggested for it."""
    bare = text.strip().strip("[]")
    if _LEADING_ZERO.search(bare):
        return ": no number in it may begin with a 0"
    try:
        return "" if bare == text else f": {ip_address(bare)} would be right"
    except ValueError:
        return ""
