"""The address of a server, as text → addresses for a socket. Pure.

A name is never looked up: a resolver that does not answer would delay the start of the agent by ten seconds or
more, on the network that the gateway serves. So the text is an address and a port, `:PORT` for all addresses of
the host, or `localhost:PORT`, which RFC 6761 defines without a resolver.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

_WRITTEN: Final = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*):(?P<port>[0-9]{1,5})")
_LAST_PORT: Final = 65_535
_ANY4, _ANY6 = "0.0.0.0", "::"  # noqa: S104 # listens there only if it is configured
_SPECIAL: Final = {"": (_ANY4, _ANY6), "localhost": ("127.0.0.1", "::1")}
# The address that reaches, from the same host, a server that listens on all addresses.
_LOOPBACK: Final = {_ANY4: "127.0.0.1", _ANY6: "::1"}


class Endpoint(NamedTuple):
    """A TCP address and port; `host` is the address as text."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.version == 6 else f"{self.host}:{self.port}"

    @property
    def version(self) -> int:
        """The version of IP: 4 or 6."""
        return 6 if ":" in self.host else 4

    @property
    def reachable(self) -> str:
        """The address for a client on this host."""
        return _LOOPBACK.get(self.host, self.host)


def parse(text: str) -> tuple[Endpoint, ...]:
    """The addresses that `text` means, at least one. Raises ValueError with what would be right."""
    written = _WRITTEN.fullmatch(text)
    if written is None or not 0 < int(written["port"]) <= _LAST_PORT:
        raise ValueError(f"{text!r} is no HOST:PORT like 127.0.0.1:9125")
    host, port = written["host"], int(written["port"])
    try:
        return tuple(_endpoint(one, port) for one in _SPECIAL.get(host.lower(), (host,)))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _endpoint(host: str, port: int) -> Endpoint:
    try:
        address = IPv6Address(host.strip("[]")) if host.startswith("[") or ":" in host else IPv4Address(host)
    except ValueError:
        raise ValueError(
            f"{host!r} is no address, and no name is looked up: 127.0.0.1:9125, [::1]:9125, localhost:9125, or "
            ":9125 for all addresses of this host would be right"
        ) from None
    if address.is_multicast or "%" in host or (address.is_link_local and address.version == 6):
        # `bind` needs the interface with a link-local address, and the configuration has no place for it.
        raise ValueError(f"no server can listen on {address}: an address of this host would be right")
    return Endpoint(str(address), port)
