"""The netlink socket that owns the table `inet portward`, and the custodian that has it too.

A table with an owner is changed by one netlink socket only: others get EPERM, and `flush ruleset` leaves it out.
With the flag `persist` it stays when its owner ends; then it has none, until the next socket adopts it. In between
any process may change it. So a process of its own (package `custodian`) keeps the socket open, and a new agent
continues with the same socket. The agent notices the end of its custodian and starts another.

If the kernel or nft of this host has no such tables (`obstacle`), or the configuration wants none, the table is a
plain one, and there is no custodian.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Collection
from typing import Final, NamedTuple

from portward import __version__
from portward.base import netns
from portward.base.netlink import attribute, string
from portward.base.resources import PYTHON
from portward.dataplane.compiled import OWNED_FLAGS
from portward.dataplane.names import FAMILY_TABLE, TABLE
from portward.dataplane.nf_tables import NFT_MSG_NEWTABLE, NFTA_TABLE_FLAGS, NFTA_TABLE_NAME
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.errors import KernelError
from portward.ipc import custody

# A custodian answers within a millisecond.
_ANSWER_S: Final = 2.0
_RETRY_S: Final = 0.005
# A custodian that ends sooner than this after its start will do so again: it is started again with a growing
# pause.
_LEAST_LIFE_S: Final = 5.0
# The first nft that can name the flag `persist`. An older one lists an adopted table so that it cannot be loaded
# again, and 1.0.6 was seen to crash.
_LEAST_NFT: Final = (1, 1)
_NFT_VERSION: Final = re.compile(r"\bv(\d+)\.(\d+)")
_NFT_S: Final = 5.0
_PROBE_TABLE: Final = "portward_probe"
_PROBE: Final = f"table inet {_PROBE_TABLE} {{ flags owner, persist; }}\n"

_log = logging.getLogger("portward.ruleset")


class CustodianError(KernelError):
    """The custodian of the table cannot be started, or does not do what it should."""


class NoCustodianError(KernelError):
    """The table has an owner, and no custodian of portward."""


class Ownership(NamedTuple):
    """Whether portward's table has an owner. `custodian` is the custodian's process id; None without one. `why`:
    the reason if the table has no owner."""

    owned: bool
    custodian: int | None
    why: str


class _Custodian:
    """A custodian process, and the connection to it."""

    def __init__(
        self, connection: socket.socket, pid: int, release: str, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        """`process` is there if this agent has started it."""
        self.connection, self.pid, self.release, self._process = connection, pid, release, process
        self._since = time.monotonic()

    def send(self, word: bytes) -> None:
        """Sends a command. A custodian that has ended takes none: see `has_ended`."""
        with contextlib.suppress(OSError):
            self.connection.send(word)

    def has_ended(self) -> bool:
        """Whether the custodian has closed the connection."""
        try:
            return not self.connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def is_young(self) -> bool:
        """Whether this agent has started it a moment ago."""
        return self._process is not None and time.monotonic() < self._since + _LEAST_LIFE_S

    def end(self) -> None:
        """Ends the process, and returns when it has ended. Raises CustodianError if it does not."""
        self.send(custody.END)
        self.connection.settimeout(_ANSWER_S)
        try:
            while self.connection.recv(1):
                pass
        except TimeoutError as error:
            raise CustodianError(
                f"the custodian of table {FAMILY_TABLE} (process {self.pid}) does not end"
            ) from error
        except ConnectionResetError:
            pass
        self.close()

    def close(self) -> None:
        """Closes the connection. A process that this agent has started, and that has ended, is waited for."""
        self.connection.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ANSWER_S)


class TableOwner:
    """The socket that writes portward's tables in the network namespace of the calling thread. For one thread,
    except `has_custodian` and `descriptor`."""

    def __init__(self, users: Collection[int] = ()) -> None:
        """If the table has an owner, the socket is that owner's, from its custodian. Otherwise it is a new one.
        `users` may have the socket from a custodian that this object starts (`base.ownership.users`). Raises
        KernelError, also if the owner is not portward's."""
        self._users = users
        self._name = netns.name_of(os.getpid())
        self.netlink = NfNetlink()
        self._listener: socket.socket | None = None
        self._custodian: _Custodian | None = None
        try:
            taken = self._take()
        except BaseException:
            self.netlink.close()
            raise
        if taken is not None:
            inherited, self._listener, self._custodian = taken
            self.netlink.close()
            self.netlink = NfNetlink(inherited)

    def _take(self) -> tuple[socket.socket, socket.socket, _Custodian] | None:
        """The sockets from the custodian of the table's owner; None if the table has no owner. An owner that has
        just been killed may be there for a moment more. Raises KernelError."""
        deadline = time.monotonic() + _ANSWER_S
        while port := owner(self.netlink):
            try:
                return _taken(port)
            except NoCustodianError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_S)
        return None

    @property
    def has_custodian(self) -> bool:
        """Whether there is a custodian, as far as is known. Any thread."""
        return self._custodian is not None

    @property
    def has_ended(self) -> bool:
        """Whether the custodian has ended, and there is no other one yet. Any thread."""
        found = self._custodian
        return found is not None and found.has_ended()

    @property
    def custodian(self) -> int | None:
        """The process id of the custodian; None without one. Any thread."""
        found = self._custodian
        return None if found is None else found.pid

    @property
    def descriptor(self) -> int | None:
        """A descriptor that is readable when the custodian has ended. None without a custodian. Any thread."""
        found = self._custodian
        return None if found is None else found.connection.fileno()

    def begin(self) -> None:
        """Starts a custodian, if there is none. It ends with this process, unless `settle` follows. Raises
        CustodianError, also if the custodian before has ended at once, or OSError."""
        if self._custodian is not None and self._custodian.has_ended():
            self._bury(self._custodian)
        # A namespace that has lost its name must not live on in a custodian.
        if self._custodian is None and (not self._name or netns.is_own(self._name)):
            self._custodian = self._started()

    def _bury(self, ended: _Custodian) -> None:
        self._custodian = None
        ended.close()
        if ended.is_young:
            raise CustodianError(f"the custodian of table {FAMILY_TABLE} (process {ended.pid}) has ended at once")
        _log.warning(
            "the custodian of table %s (process %d) has ended: another one is started", FAMILY_TABLE, ended.pid
        )

    def settle(self, *, owned: bool) -> None:
        """Sees to it that there is a custodian if the loaded table is `owned`, and none otherwise. Idempotent.
        Raises KernelError or OSError."""
        if not owned:
            self.end_custodian()
            return
        self.begin()
        if self._custodian is None:
            return
        if self._custodian.release != __version__:
            self._replace(self._custodian)
        self._custodian.send(custody.KEEP)

    def _replace(self, old: _Custodian) -> None:
        """Starts a custodian of this release in the place of one of another. Until it stays, the old one stays."""
        self._custodian = self._started()
        self._custodian.send(custody.KEEP)
        old.end()

    def _started(self) -> _Custodian:
        """A new custodian. It has the socket as soon as its process is there."""
        if self._listener is None:
            self._listener = _listening(self.netlink.port)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = (self.netlink.fileno(), self._listener.fileno(), theirs.fileno())
        argv = [*PYTHON, "-m", "portward.custodian.process", *map(str, (*descriptors, *sorted(self._users)))]
        with theirs:
            try:
                # In a session of its own, so that no terminal ends it. It writes nothing: a pipe that the caller
                # of the agent reads to its end would not end before it.
                process = subprocess.Popen(
                    argv, pass_fds=descriptors, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise CustodianError(
                    f"the custodian of table {FAMILY_TABLE} cannot be started: {error}"
                ) from error
        return _Custodian(ours, process.pid, __version__, process)

    def end_custodian(self) -> None:
        """Ends the custodian, and any other one of the same socket, which an agent that was killed may have left.
        Raises KernelError."""
        if self._custodian is None:
            return
        custodian, self._custodian = self._custodian, None
        custodian.end()
        if self._listener is not None:
            # Else this very socket would take the connections.
            self._listener.close()
            self._listener = None
        while (another := _connected(self.netlink.port)) is not None:
            inherited, listener, left = _greeted(another)
            inherited.close()
            listener.close()
            left.end()

    def let_go(self) -> None:
        """Ends the ownership: the table stays, and any process may change it. From here on `netlink` is another
        socket. Raises KernelError."""
        self.end_custodian()
        port = self.netlink.port
        self.netlink.close()
        self.netlink = NfNetlink()
        # The connection to the custodian may end a moment before its socket does.
        deadline = time.monotonic() + _ANSWER_S
        while owner(self.netlink) == port and time.monotonic() < deadline:
            time.sleep(_RETRY_S)

    def close(self) -> None:
        """Closes socket and connection. The custodian stays."""
        if self._custodian is not None:
            self._custodian.connection.close()
        if self._listener is not None:
            self._listener.close()
        self.netlink.close()


def owner(netlink: NfNetlink) -> int:
    """The address of the netlink socket that owns portward's table; 0 if it has no owner, or is not there. Raises
    KernelError if the process may not ask."""
    try:
        found = netlink.state(TABLE)
    except PermissionError as error:
        raise KernelError("asking the kernel for its rules takes root or CAP_NET_ADMIN") from error
    return 0 if found is None else found.owner


def obstacle(nft: Nft, netlink: NfNetlink) -> str:
    """Why portward's table cannot have an owner here; empty if it can. Changes nothing."""
    flags = attribute(NFTA_TABLE_NAME, string(_PROBE_TABLE)) + attribute(NFTA_TABLE_FLAGS, OWNED_FLAGS)
    try:
        netlink.commit([(NFT_MSG_NEWTABLE, flags)], dry_run=True)
    except OSError as error:
        return f"the kernel takes no table that outlives its owner ({error.strerror}): Linux 6.9 and later do"
    if old := _old_nft():
        return old
    try:
        nft.check(_PROBE)
    except KernelError as error:
        return f"libnftables takes no table that outlives its owner ({error}): 1.1 and later do"
    return "" if nft.compiles else "libnftables prints no messages that portward can read"


def _old_nft() -> str:
    """Why the program nft of this host must not meet such a table; empty if it may, or if there is none."""
    program = shutil.which("nft", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        return ""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, timeout=_NFT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not say its version: {error}"
    found = _NFT_VERSION.search(said.decode(errors="replace"))
    if found is None:
        return f"{program} does not say its version"
    if (int(found[1]), int(found[2])) < _LEAST_NFT:
        return f"{program} is of version {found[1]}.{found[2]}, and tables that outlive their owner need 1.1"
    return ""


# --- the way to a custodian ---


def _listening(port: int) -> socket.socket:
    """The listening socket of the custodians of the netlink socket with this number. Raises CustodianError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(custody.address(port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise CustodianError(f"the address of the custodian of table {FAMILY_TABLE}: {error.strerror}") from error
    return listener


def _taken(port: int) -> tuple[socket.socket, socket.socket, _Custodian]:
    """The netlink socket with this number, from its custodian, and the custodian's listening socket. Raises
    NoCustodianError, or CustodianError if the custodian gives no socket, or another one."""
    connection = _connected(port)
    if connection is None:
        raise NoCustodianError(
            f"table {FAMILY_TABLE} belongs to another program (netlink socket {port}, `ss -f netlink -p` shows "
            "which): end it"
        )
    inherited, listener, custodian = _greeted(connection)
    if inherited.family != socket.AF_NETLINK or inherited.getsockname()[0] != port:
        raise CustodianError(
            f"the custodian of table {FAMILY_TABLE} (process {custodian.pid}) has another socket: end it"
        )
    return inherited, listener, custodian


def _connected(port: int) -> socket.socket | None:
    """A connection to the custodian of the netlink socket with this number; None if there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_ANSWER_S)
    try:
        connection.connect(custody.address(port))
    except OSError:
        connection.close()
        return None
    return connection


def _greeted(connection: socket.socket) -> tuple[socket.socket, socket.socket, _Custodian]:
    """The sockets that the custodian sends at the beginning, and the custodian. Raises CustodianError if it is not
    the owner of the table, or sends nothing."""
    try:
        text, descriptors, _, _ = socket.recv_fds(
            connection, custody.GREETING_BYTES, custody.DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
    except OSError as error:
        connection.close()
        raise CustodianError(
            f"the custodian of table {FAMILY_TABLE} does not answer ({error}): end the process that `pgrep -af "
            "portward.custodian` shows; the table stays"
        ) from error
    found = [socket.socket(fileno=number) for number in descriptors]
    try:
        greeting, (inherited, listener) = custody.read(text), found
    except ValueError as error:
        for one in (connection, *found):
            one.close()
        raise CustodianError(
            f"the custodian of table {FAMILY_TABLE} does not give its socket to this user ({error}): run this as "
            "root, or as the agent's user"
        ) from error
    connection.setblocking(True)
    return inherited, listener, _Custodian(connection, greeting.process, greeting.release)
