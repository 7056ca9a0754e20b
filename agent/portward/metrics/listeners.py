"""Listening sockets, and the reason if one cannot listen."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from typing import Final

from portward.config.endpoint import Endpoint

# Clients that connect while the server rests wait here.
_BACKLOG: Final = 1_024
# `localhost` and `:PORT` name an address of each family, and a host may lack one of them.
_NO_SUCH_FAMILY: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def unreachable(errors: Mapping[Endpoint, OSError | None]) -> str:
    """Why a server does not listen at one of its addresses; empty if it listens at all. `errors` has None for an
    address at which it listens. If it listens at one address, a family that the host lacks does not count."""
    listens = None in errors.values()
    for endpoint, error in errors.items():
        if error is not None and not (listens and error.errno in _NO_SUCH_FAMILY):
            return f"{endpoint}: {error.strerror}"
    return ""


def try_to_listen(endpoints: Sequence[Endpoint]) -> str:
    """Why a server could not listen at one of these addresses now, as `unreachable` returns it."""
    errors: dict[Endpoint, OSError | None] = dict.fromkeys(endpoints)
    for endpoint in endpoints:
        try:
            listening(endpoint, alone=len(endpoints) == 1).close()
        except OSError as error:
            errors[endpoint] = error
    return unreachable(errors)


def listening(endpoint: Endpoint, *, alone: bool) -> socket.socket:
    """A socket that listens at `endpoint`. Raises OSError. `alone`: the configuration has no other endpoint; then
    `[::]` also accepts IPv4."""
    family = socket.AF_INET6 if endpoint.version == 6 else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.version == 6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not alone)
        opened.bind((endpoint.host, endpoint.port))
        opened.listen(_BACKLOG)
    except OSError:
        opened.close()
        raise
    return opened
