"""The pages on files, their formats, and the store. Names of files, numbers of formats and the store's schema come
from the code."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from package.reference.tables import code, table
from portward.config.keys import DEFAULT_PATH, DEFAULT_TABLE, Config
from portward.daemon import runtime, settings
from portward.daemon.countsfile import _MAGIC, _SLOTS
from portward.ipc import counters
from portward.store.backends import open_store
from portward.store.sqlite import schema
from portward.table import account, layout

_STORE: Final = Config(segments=("_",), uplinks=("_",)).store.removeprefix("sqlite:")
_COUNTS: Final = ", ".join(_SLOTS)

# Path → what it is. Names without a folder are in the folder of the policy table.
_FILES: Final = {
    str(DEFAULT_PATH): "The [configuration](configuration.md).",
    _STORE: "The store: policy, and the log of its changes. SQLite with a write-ahead log, so `-wal` and "
    "`-shm` belong to it. See [Back up and restore the store](../how-to/restore.md).",
    str(DEFAULT_TABLE): "The folder of the policy table. The names below are in it.",
    "data.mdb, lock.mdb": "The policy table: an LMDB environment.",
    "data.mdb.damaged": "A policy table that could not be read, put aside. You may delete it.",
    runtime._LOCK: "The agent holds a lock on it while it runs, so that each table has one agent.",
    "worker-N": "The lock of the worker that answers queue N.",
    runtime._STATUS: "What `portward status` prints, written anew each second.",
    settings._FILE: "The configuration and the preset as the agent last loaded them. Verbs go by it while "
    "the agent runs.",
    _COUNTS: "The sums of the metrics, in two slots that are written in turn. They outlive a restart.",
    runtime._CRASH: "What Python printed if the last agent crashed.",
    "/usr/lib/portward": "The program, the boot fallback `baseline`, `closed.nft`, and `closed-bridge.nft`.",
}
_STORE_ANEW: Final = "not read: the store is read anew"
_SUMS_ANEW: Final = "not read: the sums begin anew"
_REFUSED: Final = "the worker refuses the block, and its queue drops"
_BY_TOML: Final = "not read: verbs go by `portward.toml`"


def fills() -> dict[str, object]:
    """The values for the text of the page."""
    formats = (
        (
            "store",
            f"`user_version` {schema.FORMAT}",
            f"{schema.UNSEALED} is read, and sealed by the first write",
            "refused",
        ),
        (
            "policy table",
            f"{layout.FORMAT}, in the head and in the names of its parts; accounts {account.VERSION}",
            _STORE_ANEW,
            _STORE_ANEW,
        ),
        (_coded(_COUNTS), f"{code(_MAGIC.decode())} in the header, with a checksum", _SUMS_ANEW, _SUMS_ANEW),
        (
            "counters of a worker",
            f"magic, version {counters.VERSION} and sizes in the header of the shared block",
            _REFUSED,
            _REFUSED,
        ),
        (
            code(runtime._STATUS),
            f"`format` {runtime.STATUS_FORMAT}; keys may be added without another number",
            "read; without the key it counts as 1",
            "refused",
        ),
        (code(settings._FILE), f"`format` {settings._FORMAT}", _BY_TOML, _BY_TOML),
    )
    return {
        "files": table(("path", "what it is"), ((_coded(path), what) for path, what in _FILES.items())),
        "formats": table(("what", "format", "one that is older", "one that is newer"), formats),
    }


def store_fills() -> dict[str, object]:
    """The values for the page on the store: the schema of a new one."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        open_store(f"sqlite:{path}", create=True).close()
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND type = 'table'")
            return {"schema": "\n".join(f"{sql};" for (sql,) in found)}


def _coded(paths: str) -> str:
    return ", ".join(map(code, paths.split(", ")))
