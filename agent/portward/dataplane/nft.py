"""The only module that calls libnftables: a ruleset text goes in, a KernelError with one line comes out if it
fails.

The library is called in the process, because a start of the `nft` program takes some milliseconds, and a call 0.3
ms. Each text is one transaction: all of it takes effect, or nothing. The elements of sets, which change all the
time, are written by netlink (`elements`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeAlias

from portward.base.descriptors import Reserve
from portward.base.interfaces import encoded
from portward.dataplane import compiled
from portward.dataplane.compiled import Message, UnreadableError
from portward.dataplane.elements import Add, messages
from portward.dataplane.ruleset import Wanted
from portward.errors import KernelError

# nftables/libnftables.h: NFT_CTX_OUTPUT_TERSE leaves the elements of sets out of listings, NFT_DEBUG_MNL prints
# the messages of a transaction.
_OUTPUT_TERSE = 1 << 11
_DEBUG_MNL = 1 << 4
# A mark or an interface index, in the byte order of the host.
_NUMBER: Final = struct.Struct("=I")
# Compiled texts that are cached, because a repair loads the same text again: four of each table.
_MAX_CACHED_TEXTS: Final = 8
# The type of the message that begins a transaction (NFNL_MSG_BATCH_BEGIN), as libmnl prints it. For a text with a
# mistake libnftables prints no messages.
_BATCH_BEGIN_PRINTED: Final = b"| 00016 |"

_log = logging.getLogger("portward.ruleset")


# A call opens a socket to nf_tables, a socket to rtnetlink, and files of names, one at a time. More descriptors
# are reserved, because other threads may take some of those that are released for the call.
_NEEDED_DESCRIPTORS, _RESERVED_DESCRIPTORS = 3, 8

_P = ParamSpec("_P")
_Call: TypeAlias = "Callable[Concatenate[Nft, _P], str]"


def _library() -> ctypes.CDLL:
    """The C library with the types of its functions. Raises KernelError if libnftables1 is not installed."""
    try:
        # By its full name, because `find_library` would start ldconfig.
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
    """Raises KernelError instead of calling libnftables without free descriptors, because it then calls exit()."""

    @functools.wraps(call)
    def ensured(self: Nft, /, *arguments: _P.args, **named: _P.kwargs) -> str:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.reserve.ensured(_NEEDED_DESCRIPTORS))
            except OSError as error:
                raise KernelError(f"no descriptor is left for nftables: {error.strerror}") from error
            return call(self, *arguments, **named)

    return ensured


class Socket(Protocol):
    """The socket that makes portward's transactions: `NfNetlink`."""

    def transact(self, messages: list[Message], *, dry_run: bool = False) -> object:
        """Sends a transaction to the kernel. Raises OSError, and then nothing has changed."""

    def committing(self) -> AbstractContextManager[None]:
        """Stands around each transaction of portward."""


class Nft:
    """nftables in the network namespace of the thread that makes this object."""

    _socket: Socket | None = None
    _compiles = False

    def __init__(self, socket: Socket | None = None, *, compiles: bool = True) -> None:
        """With `socket` and `compiles`, libnftables only compiles the texts of all methods but `load`, so it reads
        nothing from the kernel (module `compiled`), and the socket makes the transactions. Otherwise libnftables
        makes them; `socket`, if given, still counts them. Raises KernelError if libnftables is missing."""
        self._lib = _library()
        self._socket, self._compiles = socket, compiles and socket is not None
        self._compiled_texts: dict[str, list[Message]] = {}
        self.reserve = Reserve(_RESERVED_DESCRIPTORS)

    def _context(self) -> Any:
        context = self._lib.nft_ctx_new(0)
        self._lib.nft_ctx_buffer_output(context)
        self._lib.nft_ctx_buffer_error(context)
        return context

    def _run(self, context: Any, text: str, *, printed: bool = False) -> str:
        """The output of libnftables. With `printed` an error of the kernel does not matter."""
        failed = self._lib.nft_run_cmd_from_buffer(context, encoded(text))
        errors: bytes = self._lib.nft_ctx_get_error_buffer(context)
        output: bytes = self._lib.nft_ctx_get_output_buffer(context)
        if failed and not (printed and _BATCH_BEGIN_PRINTED in output):
            raise KernelError(f"nft: {_first_error(_text(errors))}")
        return _text(output)

    def load(self, ruleset: str) -> None:
        """Commits a whole ruleset as one transaction. Raises KernelError, and then nothing has changed."""
        with self._committing():
            self._once(ruleset, dry_run=False)

    def check(self, ruleset: str, head: str = "") -> None:
        """Asks the kernel whether it would take the ruleset after the plain commands in `head`. Changes nothing.
        Raises KernelError if not."""
        if not self._sent(head, ruleset, dry_run=True):
            self._once(head + ruleset, dry_run=True)

    def check_replacement(self, head: str, want: Wanted) -> None:
        """Asks the kernel whether `replace` would work. Changes nothing. Raises KernelError if not."""
        if not self._sent(head, want.fixed, compiled.making(want.table, _elements(want)), dry_run=True):
            self._once(head + want.text, dry_run=True)

    def prepare(self, want: Wanted) -> None:
        """Compiles `want.fixed` in advance for the next `replace`. Raises KernelError."""
        if self._compiles:
            with contextlib.suppress(UnreadableError):
                self._compiled(want.fixed)

    def replace(self, head: str, want: Wanted) -> None:
        """Commits `want` after the plain commands in `head` as one transaction. Raises KernelError, and then
        nothing has changed."""
        with self._committing():
            if not self._sent(head, want.fixed, compiled.making(want.table, _elements(want))):
                self._once(head + want.text, dry_run=False)

    def add(self, ruleset: str) -> None:
        """Commits a text that names only objects that it defines itself. Raises KernelError."""
        with self._committing():
            if not self._sent("", ruleset):
                self._once(ruleset, dry_run=False)

    def create(self, table: str, ruleset: str) -> None:
        """Commits a text that names only objects that it defines itself. Raises KernelError, also if this table
        (family and name) exists already."""
        head = f"create table {table}\n"
        with self._committing():
            if not self._sent(head, ruleset):
                self._once(head + ruleset, dry_run=False)

    def delete(self, table: str) -> None:
        """Deletes a table (family and name). Raises KernelError, also if there is none."""
        with self._committing():
            if not self._sent(f"delete table {table}\n", ""):
                self._once(f"delete table {table}\n", dry_run=False)

    def _sent(self, head: str, text: str, more: list[Message] | None = None, *, dry_run: bool = False) -> bool:
        """Sends the messages of the plain commands in `head`, of `text`, and `more`. False if libnftables makes
        the transactions, or if it prints messages in another form. Raises KernelError."""
        if self._socket is None or not self._compiles:
            return False
        try:
            transaction = [*compiled.plain(head), *self._compiled(text), *(more or [])]
        except UnreadableError as error:
            _log.warning("libnftables loads the rulesets itself: %s", error)
            self._compiles = False
            return False
        try:
            self._socket.transact(transaction, dry_run=dry_run)
        except OSError as error:
            about = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            raise KernelError(f"nft: Error: Could not process rule: {error.strerror}{about}") from error
        return True

    def _compiled(self, text: str) -> list[Message]:
        """The messages of a text. Raises KernelError if libnftables does not understand the text."""
        if not text:
            return []
        if text not in self._compiled_texts:
            printed = self._once(compiled.FETCH_NOTHING + text, dry_run=True, debug=_DEBUG_MNL)
            self._compiled_texts[text] = compiled.messages(printed)
            for old in list(self._compiled_texts)[:-_MAX_CACHED_TEXTS]:
                del self._compiled_texts[old]
        return self._compiled_texts[text]

    @property
    def compiles(self) -> bool:
        """Whether the socket makes the transactions of this object, except those of `load`."""
        return self._compiles

    def listing(self, table: str) -> str:
        """The table as nft prints it, without the elements of its sets. Raises KernelError if there is none."""
        return self._once(f"list table {table}", dry_run=False, flags=_OUTPUT_TERSE)

    def _committing(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._socket is None else self._socket.committing()

    @_with_descriptors
    def _once(self, text: str, *, dry_run: bool, flags: int = 0, debug: int = 0) -> str:
        # Each command has its own context, because a `define` outlives the command in its context.
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


def _text(output: bytes) -> str:
    # nft prints the names of interfaces, which need not be UTF-8.
    return output.decode(errors="backslashreplace")


def _first_error(errors: str) -> str:
    """The first line of nft's errors, and the command that it points at."""
    lines = errors.strip().splitlines() or ["failed without a word"]
    message = lines[0].removeprefix("/dev/stdin:")
    command = lines[1].strip().removeprefix(compiled.FETCH_NOTHING) if len(lines) > 1 else ""
    return f"{message}: {command}" if command else message
