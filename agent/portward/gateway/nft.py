"""The one place that runs nftables: a ruleset text goes in, nothing or a one-line error comes out.

libnftables is called in the process: starting the `nft` program costs some milliseconds, a call 0.3 ms,
and a change of policy is to be in the kernel within ten. A text is one transaction: all of it or none.
The context speaks to the network namespace in which it was made.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

from portward.errors import KernelError

# From nftables/libnftables.h: leave the elements of sets out of listings.
_OUTPUT_TERSE = 1 << 11


def _library() -> ctypes.CDLL:
    """The C library, typed; raises KernelError where Debian's libnftables1 is not installed."""
    try:
        lib = ctypes.CDLL(ctypes.util.find_library("nftables") or "libnftables.so.1")
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


class Nft:
    """nftables in the network namespace of the thread that makes this object."""

    def __init__(self) -> None:
        """Raises KernelError where libnftables is missing."""
        self._lib = _library()
        self._elements = self._context()
        # Transactions committed through this object: each raises the kernel's generation by one.
        self.commits = 0

    def _context(self) -> Any:
        context = self._lib.nft_ctx_new(0)
        self._lib.nft_ctx_buffer_output(context)
        self._lib.nft_ctx_buffer_error(context)
        return context

    def _run(self, context: Any, text: str) -> str:
        failed = self._lib.nft_run_cmd_from_buffer(context, text.encode())
        errors: bytes = self._lib.nft_ctx_get_error_buffer(context)
        output: bytes = self._lib.nft_ctx_get_output_buffer(context)
        if failed:
            raise KernelError(f"nft: {_first_error(errors.decode())}")
        return output.decode()

    def load(self, ruleset: str) -> None:
        """Commits a whole ruleset as one transaction; raises KernelError, and then nothing has changed."""
        self._once(ruleset, dry_run=False)
        self.commits += 1

    def check(self, ruleset: str) -> None:
        """Asks the kernel whether it would take the ruleset, without changing anything; raises KernelError."""
        self._once(ruleset, dry_run=True)

    def listing(self, table: str) -> str:
        """The table as nft prints it, without the elements of its sets; raises KernelError if there is none."""
        return self._once(f"list table {table}", dry_run=False, flags=_OUTPUT_TERSE)

    def elements(self, commands: str) -> None:
        """Runs commands on elements (no `define`) as one transaction; raises KernelError."""
        self._run(self._elements, commands)
        self.commits += 1

    def _once(self, text: str, *, dry_run: bool, flags: int = 0) -> str:
        # A context of its own: `define`s outlive the command in a context.
        context = self._context()
        try:
            self._lib.nft_ctx_set_dry_run(context, dry_run)
            self._lib.nft_ctx_output_set_flags(context, flags)
            return self._run(context, text)
        finally:
            self._lib.nft_ctx_free(context)


def _first_error(errors: str) -> str:
    """The first line of what nft says, and the command that it points at."""
    lines = errors.strip().splitlines() or ["failed without a word"]
    told = lines[0].removeprefix("/dev/stdin:")
    return f"{told}: {lines[1].strip()}" if len(lines) > 1 and lines[1].strip() else told
