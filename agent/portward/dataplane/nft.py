"""The one place that runs nftables: a ruleset text goes in, nothing or a one-line error comes out.

libnftables is called in the process: starting the `nft` program costs some milliseconds, a call 0.3 ms. A text is
one transaction: all of it or none. What changes all the time, the elements of sets, is written by netlink
(`elements`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeAlias

from portward.base.descriptors import Reserve
from portward.base.interfaces import encoded
from portward.dataplane import compiled
from portward.dataplane.compiled import Message, UnreadableError
from portward.dataplane.elements import Add, messages
from portward.dataplane.ruleset import Wanted
from portward.errors import KernelError

# From nftables/libnftables.h: leave the elements of sets out of listings; print the messages of a transaction.
_OUTPUT_TERSE = 1 << 11
_DEBUG_MNL = 1 << 4
# Marks and interface indexes are kept in the host's byte order.
_NUMBER: Final = struct.Struct("=I")
# Compiled texts that are kept: a repair loads what was loaded before.
_KEPT: Final = 4


# The type of the message with which a transaction begins, as it is printed; a text with a mistake gives none.
_MESSAGES: Final = b"| 00016 |"

_log = logging.getLogger("portward.ruleset")


# A call opens a socket to nf_tables, one to rtnetlink for interfaces, and files of names, one at a time. More are
# held, since other threads may take some of those that are given back.
_NEEDED, _RESERVED = 3, 8

_P = ParamSpec("_P")
_Call: TypeAlias = "Callable[Concatenate[Nft, _P], str]"


def _library() -> ctypes.CDLL:
    """The C library, typed; raises KernelError where Debian's libnftables1 is not installed."""
    try:
        # By its name: `find_library` would start ldconfig at each start of the agent.
        lib = ctypes.CDLL("libnftables.so.1")
    except OSError as error:
        raise KernelError(f"libnftables cannot be loaded ({error}): install the package nftables") from error
    context, text = ctypes.c_void_p, ctypes.c_char_p
    lib.nft_ctx_new.restype, lib.nft_ctx_new.argtypes = context, [ctypes.c_uint32]
    lib.nft_ctx_free.restype, lib.nft_ctx_free.argtypes = None, [context]
    lib.nft_ctx_set_dry_run.restype, lib.nft_ctx_set_dry_run.argtypes = None, [context, ctypes.c_bool]
    lib.nft_ctx_output_set_flags.restype, lib.nft_ctx_output_set_flags.argtypes = (
        None,
        [context, ctypes.c_uint],
    )
    lib.nft_ctx_output_set_debug.restype, lib.nft_ctx_output_set_debug.argtypes = None, [context, ctypes.c_uint]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(lib, name).restype, getattr(lib, name).argtypes = ctypes.c_int, [context]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(lib, name).restype, getattr(lib, name).argtypes = text, [context]
    lib.nft_run_cmd_from_buffer.restype, lib.nft_run_cmd_from_buffer.argtypes = ctypes.c_int, [context, text]
    return lib


def _with_descriptors(call: _Call[_P]) -> _Call[_P]:
    """Refuses a call of libnftables that would get no socket: it ends the process then, by exit()."""

    @functools.wraps(call)
    def ensured(self: Nft, /, *arguments: _P.args, **named: _P.kwargs) -> str:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.reserve.ensured(_NEEDED))
            except OSError as error:
                raise KernelError(f"no descriptor is left for nftables: {error.strerror}") from error
            return call(self, *arguments, **named)

    return ensured


class Transact(Protocol):
    """Sends a transaction to the kernel; raises OSError, and then nothing has changed (`NfNetlink.transact`)."""

    def __call__(self, messages: list[Message], *, dry_run: bool = False) -> object: ...


class Nft:
    """nftables in the network namespace of the thread that makes this object."""

    _transact: Transact | None = None

    def __init__(self, generation: Callable[[], int] = int, transact: Transact | None = None) -> None:
        """`generation` gives the kernel's number of ruleset transactions (`NfNetlink.generation`). With `transact`
        libnftables only compiles what `replace`, `add`, `check` and `delete` are given, so it reads nothing of the
        kernel's, see `compiled`. Raises KernelError where libnftables is missing."""
        self._lib = _library()
        self._generation, self._transact = generation, transact
        self._kept: dict[str, list[Message]] = {}
        self.reserve = Reserve(_RESERVED)
        # The generation after our last transaction, and whether one of somebody else's came between ours.
        self.left_at: int | None = None
        self.disturbed = False

    def _context(self) -> Any:
        context = self._lib.nft_ctx_new(0)
        self._lib.nft_ctx_buffer_output(context)
        self._lib.nft_ctx_buffer_error(context)
        return context

    def _run(self, context: Any, text: str, *, printed: bool = False) -> str:
        """What libnftables prints. With `printed` it does not matter what the kernel says to it."""
        failed = self._lib.nft_run_cmd_from_buffer(context, encoded(text))
        errors: bytes = self._lib.nft_ctx_get_error_buffer(context)
        output: bytes = self._lib.nft_ctx_get_output_buffer(context)
        if failed and not (printed and _MESSAGES in output):
            raise KernelError(f"nft: {_first_error(_text(errors))}")
        return _text(output)

    def load(self, ruleset: str) -> None:
        """Commits a whole ruleset as one transaction; raises KernelError, and then nothing has changed."""
        with self.committing():
            self._once(ruleset, dry_run=False)

    def check(self, ruleset: str, head: str = "") -> None:
        """Asks the kernel whether it would take the ruleset, after the plain commands in `head`, without changing
        anything; raises KernelError."""
        if not self._sent(head, ruleset, dry_run=True):
            self._once(head + ruleset, dry_run=True)

    def check_replacement(self, head: str, want: Wanted) -> None:
        """Asks the kernel whether `replace` would work, without changing anything; raises KernelError."""
        if not self._sent(head, want.fixed, _elements(want), dry_run=True):
            self._once(head + want.text, dry_run=True)

    def prepare(self, want: Wanted) -> None:
        """Makes the next `replace` with the same `want.fixed` cost less; raises KernelError."""
        if self._transact is not None:
            with contextlib.suppress(UnreadableError):
                self._compiled(want.fixed)

    def replace(self, head: str, want: Wanted) -> None:
        """Commits `want` after the plain commands in `head` as one transaction; raises KernelError, and then
        nothing has changed."""
        with self.committing():
            if not self._sent(head, want.fixed, _elements(want)):
                self._once(head + want.text, dry_run=False)

    def add(self, ruleset: str) -> None:
        """Commits a text that names nothing but what it defines itself; raises KernelError."""
        with self.committing():
            if not self._sent("", ruleset):
                self._once(ruleset, dry_run=False)

    def create(self, table: str, ruleset: str) -> None:
        """Commits a text that names nothing but what it defines itself, unless there is this table of family inet
        already; raises KernelError."""
        head = f"create table inet {table}\n"
        with self.committing():
            if not self._sent(head, ruleset):
                self._once(head + ruleset, dry_run=False)

    def delete(self, table: str) -> None:
        """Deletes a table of family inet; raises KernelError, also if there is none."""
        with self.committing():
            if not self._sent(f"delete table inet {table}\n", ""):
                self._once(f"delete table inet {table}\n", dry_run=False)

    def _sent(
        self, head: str, text: str, more: list[tuple[int, bytes]] | None = None, *, dry_run: bool = False
    ) -> bool:
        """Sends the messages of the plain commands in `head`, of `text`, and `more`; False without `transact`,
        or if this libnftables prints them in another way. Raises KernelError."""
        if self._transact is None:
            return False
        try:
            transaction = [*compiled.plain(head), *self._compiled(text), *map(compiled.inet, more or [])]
        except UnreadableError as error:
            _log.warning("rulesets are loaded by libnftables itself: %s", error)
            self._transact = None
            return False
        try:
            self._transact(transaction, dry_run=dry_run)
        except OSError as error:
            about = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            raise KernelError(f"nft: Error: Could not process rule: {error.strerror}{about}") from error
        return True

    def _compiled(self, text: str) -> list[Message]:
        """The messages of a text. Raises KernelError for one that libnftables does not understand."""
        if not text:
            return []
        if text not in self._kept:
            printed = self._once(compiled.FETCH_NOTHING + text, dry_run=True, debug=_DEBUG_MNL)
            self._kept[text] = compiled.messages(printed)
            for old in list(self._kept)[:-_KEPT]:
                del self._kept[old]
        return self._kept[text]

    @property
    def compiles(self) -> bool:
        """Whether all transactions of this object are those of `transact`."""
        return self._transact is not None

    def listing(self, table: str) -> str:
        """The table as nft prints it, without the elements of its sets; raises KernelError if there is none."""
        return self._once(f"list table {table}", dry_run=False, flags=_OUTPUT_TERSE)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Notes whether the generation rose by more than our own transaction, which adds one or, where there is
        nothing to change, none."""
        before = self._generation()
        if self.left_at is not None and before != self.left_at:
            self.disturbed = True
        yield
        after = self._generation()
        if (after - before) % 2**32 > 1:
            self.disturbed = True
        self.left_at = after

    @_with_descriptors
    def _once(self, text: str, *, dry_run: bool, flags: int = 0, debug: int = 0) -> str:
        # A context of its own: `define`s outlive the command in a context.
        context = self._context()
        try:
            self._lib.nft_ctx_set_dry_run(context, dry_run)
            self._lib.nft_ctx_output_set_flags(context, flags)
            if debug:
                self._lib.nft_ctx_output_set_debug(context, debug)
            return self._run(context, text, printed=bool(debug))
        finally:
            self._lib.nft_ctx_free(context)


def _elements(want: Wanted) -> list[tuple[int, bytes]]:
    return [
        message
        for set_, numbers in want.numbers.items()
        for message in messages(Add(set_, [_NUMBER.pack(number) for number in numbers]))
    ]


def _text(said: bytes) -> str:
    # nft quotes the names of interfaces, which need not be UTF-8.
    return said.decode(errors="backslashreplace")


def _first_error(errors: str) -> str:
    """The first line of what nft says, and the command that it points at."""
    lines = errors.strip().splitlines() or ["failed without a word"]
    told = lines[0].removeprefix("/dev/stdin:")
    where = lines[1].strip().removeprefix(compiled.FETCH_NOTHING) if len(lines) > 1 else ""
    return f"{told}: {where}" if where else told
