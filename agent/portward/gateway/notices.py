"""The kernel says when anybody has changed a ruleset: the look for what was changed need not wait for its turn."""

from __future__ import annotations

import errno
import socket
from typing import Final

from portward.gateway.netlink import NETLINK_NETFILTER

_NFNLGRP_NFTABLES: Final = 7  # linux/netfilter/nfnetlink.h
_LARGEST: Final = 65_536


class Notices:
    """Hears of all changes of rulesets, our own too, in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        """Raises OSError where the kernel gives no such socket."""
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
        )
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))

    def fileno(self) -> int:
        """A descriptor that can be read after a change."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Forgets the notices so far. What they say is not asked: whoever looks afterwards sees it all."""
        while True:
            try:
                self._socket.recv(_LARGEST)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more than were kept for us; the rest is still to be read
                    raise

    def close(self) -> None:
        """Stops listening."""
        self._socket.close()
