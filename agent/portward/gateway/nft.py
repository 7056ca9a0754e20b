"""The one place that runs nftables: a ruleset text goes in, nothing or a one-line error comes out.

libnftables is called in the process: starting the `nft` program costs some milliseconds, a call 0.3 ms. A text is
one transaction: all of it or none. What changes all the time, the elements of sets, is written by netlink
(`elements`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeAlias

from portward.descriptors import Reserve
from portward.errors import KernelError
from portward.interfaces import encoded

# From nftables/libnftables.h: leave the elements of sets out of listings.
_OUTPUT_TERSE = 1 << 11


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


class Nft:
    """nftables in the network namespace of the thread that makes this object."""

    def __init__(self, generation: Callable[[], int] = int) -> None:
        """`generation` gives the kernel's number of ruleset transactions (`NfNetlink.generation`). Raises
        KernelError where libnftables is missing."""
        self._lib = _library()
        self._generation = generation
        self.reserve = Reserve(_RESERVED)
        # The generation after our last transaction, and whether one of somebody else's came between ours.
        self.left_at: int | None = None
        self.disturbed = False

    def _context(self) -> Any:
        context = self._lib.nft_ctx_new(0)
        self._lib.nft_ctx_buffer_output(context)
        self._lib.nft_ctx_buffer_error(context)
        return context

    def _run(self, context: Any, text: str) -> str:
        failed = self._lib.nft_run_cmd_from_buffer(context, encoded(text))
        errors: bytes = self._lib.nft_ctx_get_error_buffer(context)
        output: bytes = self._lib.nft_ctx_get_output_buffer(context)
        if failed:
            raise KernelError(f"nft: {_first_error(_text(errors))}")
        return _text(output)

    def load(self, ruleset: str) -> None:
        """Commits a whole ruleset as one transaction; raises KernelError, and then nothing has changed."""
        with self.committing():
            self._once(ruleset, dry_run=False)

    def check(self, ruleset: str) -> None:
        """Asks the kernel whether it would take the ruleset, without changing anything; raises KernelError."""
        self._once(ruleset, dry_run=True)

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
    def _once(self, text: str, *, dry_run: bool, flags: int = 0) -> str:
        # A context of its own: `define`s outlive the command in a context.
        context = self._context()
        try:
            self._lib.nft_ctx_set_dry_run(context, dry_run)
            self._lib.nft_ctx_output_set_flags(context, flags)
            return self._run(context, text)
        finally:
            self._lib.nft_ctx_free(context)


def _text(said: bytes) -> str:
    # nft quotes the names of interfaces, which need not be UTF-8.
    return said.decode(errors="backslashreplace")


def _first_error(errors: str) -> str:
    """The first line of what nft says, and the command that it points at."""
    lines = errors.strip().splitlines() or ["failed without a word"]
    told = lines[0].removeprefix("/dev/stdin:")
    return f"{told}: {lines[1].strip()}" if len(lines) > 1 and lines[1].strip() else told
