"""The custodian process.

    python -m portward.custodian.process SOCKET LISTENER AGENT USER…

The first three are descriptors: the netlink socket that owns the table; the listening socket at
`custody.address`; and a connection to the agent that has started this process. It ends with that agent, unless the
agent has sent KEEP. The others are the ids of the users to whom it gives the netlink socket.

It also ends if its network namespace loses its name: otherwise a removed namespace would live on in this process,
with all its interfaces.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Collection
from typing import Final

from portward import __version__
from portward.base import netns
from portward.ipc import custody

# struct ucred: process, user, group (unix(7), SO_PEERCRED).
_CREDENTIALS: Final = struct.Struct("3i")
# An agent that starts, and a verb beside it. More connections are refused.
_MAX_PEERS: Final = 8
# How often the name of the network namespace is looked up.
_LOOK_S: Final = 2.0
# Without a free descriptor `accept` fails again at once.
_PAUSE_S: Final = 0.1


class Custodian:
    """Keeps a netlink socket, and passes it on."""

    def __init__(self, owner: int, listener: socket.socket, agent: socket.socket, users: Collection[int]) -> None:
        """`owner` is the descriptor of the netlink socket, `agent` the connection to the agent that has started
        this process. `users` are the ids of the users that may have the netlink socket."""
        self._owner, self._listener, self._users = owner, listener, frozenset(users)
        # Two custodians may share the listener for a moment, and one of them gets the connection.
        listener.setblocking(False)
        self._agent = agent.fileno()
        self._peers = {self._agent: agent}
        self._kept = self._over = False
        self._name = netns.name_of(os.getpid())
        self._poll = select.poll()
        self._poll.register(listener.fileno(), select.POLLIN)
        self._poll.register(self._agent, select.POLLIN)

    def serve(self) -> None:
        """Returns when the process should end."""
        while not self._over:
            for descriptor, _ in self._poll.poll(_LOOK_S * 1000 if self._name else None):
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor in self._peers:
                    self._hear(descriptor)
            self._over |= bool(self._name) and not netns.is_own(self._name)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            time.sleep(_PAUSE_S)
            return
        if len(self._peers) >= _MAX_PEERS or not self._admits(peer) or not self._greet(peer):
            peer.close()
            return
        self._peers[peer.fileno()] = peer
        self._poll.register(peer.fileno(), select.POLLIN)

    def _admits(self, peer: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            found = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return _CREDENTIALS.unpack(found)[1] in self._users
        return False

    def _greet(self, peer: socket.socket) -> bool:
        """Sends the greeting with the descriptors. False if the peer has gone."""
        peer.setblocking(False)
        try:
            text = custody.greeting(os.getpid(), __version__)
            socket.send_fds(peer, [text], [self._owner, self._listener.fileno()])
        except OSError:
            return False
        return True

    def _hear(self, descriptor: int) -> None:
        """Carries out the next command of a peer."""
        try:
            word = self._peers[descriptor].recv(1)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if word == custody.KEEP:
            self._kept = True
        elif word == custody.END:
            self._over = True
        elif not word:
            self._forget(descriptor)

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._peers.pop(descriptor).close()
        if descriptor == self._agent:
            # Its number may be used again.
            self._agent = -1
            self._over |= not self._kept


def main() -> int:
    """Runs the custodian."""
    owner, listener, agent, *users = map(int, sys.argv[1:])
    # Ctrl-C in a terminal and a reload of the whole unit reach this process too.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Custodian(owner, socket.socket(fileno=listener), socket.socket(fileno=agent), users).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
