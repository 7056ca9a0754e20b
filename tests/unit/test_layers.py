"""The layers of the package: rooms import only downwards, no modules import each other in a circle, and each
foreign library has one home."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import house

ROOT = Path(__file__).resolve().parents[2] / "agent" / "portward"

# Rows of rooms, from the top. Rooms in one row do not import each other, except in the last row, which all others
# use.
ROOMS = (
    ("__main__",),
    ("cli",),
    ("lab",),
    ("ops",),
    ("daemon", "worker"),
    ("metrics", "dataplane"),
    ("ipc",),
    ("exemptions",),
    ("inventory", "table"),
    ("store",),
    ("policy",),
    ("config",),
    ("base", "errors", "i18n", "model", "__init__"),
)

# Library → the modules or rooms that may import it. Standard libraries are here if they must have one home.
# msgspec is not here, because records are its structs.
HOMES = {
    "lmdb": {"table.database"},
    "sqlite3": {"store.sqlite.database"},
    "inotify_simple": {"store.notifier"},
    "netfilterqueue": {"worker.single"},
    "prometheus_client": {"metrics.exporter"},
    "aiosmtpd": {"lab.mail"},
    "yaml": {"inventory.yaml_document"},
    "typer": {"cli"},
    "rich": {"cli", "lab.demo"},
}

# Modules that decide or check. They use no file, no clock and no network, and import no module that does.
FREE_OF_IO = (
    "cli/exemption_text.py", "cli/status_text.py", "config/documents.py", "config/keys.py", "config/toml.py",
    "dataplane/accounting.py", "dataplane/compiled.py", "dataplane/elements.py", "dataplane/gate.py",
    "dataplane/links.py", "dataplane/nf_tables.py", "dataplane/prefixes.py", "dataplane/rate_limits.py",
    "dataplane/setdump.py", "dataplane/interface_sets.py", "dataplane/tunnels.py", "dataplane/verdict_cache.py",
    "exemptions/lifecycle.py", "exemptions/service.py", "i18n/language.py", "inventory/difference.py",
    "inventory/document.py", "inventory/json_document.py", "inventory/records.py", "policy/decide.py",
    "policy/preset.py", "policy/remedy.py", "store/chain.py", "store/codec.py", "store/confirmation.py",
    "store/flips.py", "store/lookup.py", "config/interface_lists.py", "dataplane/reach.py",
    "store/protocol.py", "store/update.py", "store/validity.py", "store/values.py",
)  # fmt: skip


def _name(path: Path) -> str:
    """The dotted name within the package; a room's own `__init__` has the room's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also within functions. For the package's own modules, also each imported
    name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for imported in imports(MODULES[name]):
        if imported.split(".", maxsplit=1)[0] == "portward":
            target = imported.removeprefix("portward.")
            while target not in MODULES:
                target = target.rpartition(".")[0] or "__init__"
            found.add(target)
    return found - {name}  # `python -m` loads a module under a second name


def _room(name: str) -> tuple[int, str]:
    """The row of a module's room, 0 at the top, and the room."""
    room = name.split(".", maxsplit=1)[0]
    for number, row in enumerate(ROOMS):
        if room in row:
            return number, room
    raise AssertionError(f"{name} stands in no room: add it to the test, and to docs/explanation/architecture.md")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name: str) -> None:
    row, room = _room(name)
    for imported in own_imports(name):
        below, other = _room(imported)
        beside = below == row and (other == room or row == len(ROOMS) - 1)
        assert below > row or beside, f"{name} imports {imported}, which is not below it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    # Raises CycleError with the circle. A package's own `__init__` comes before its modules in any case.
    list(graphlib.TopologicalSorter({name: own_imports(name) for name in MODULES}).static_order())


def test_the_two_processes_know_nothing_of_each_other() -> None:
    """The worker imports no module of the daemon, and the daemon none of the worker, also not through others."""
    assert not {name for name in _reached("worker.process") if _room(name)[1] in ("daemon", "dataplane")}
    assert not {name for name in _reached("daemon.composition") if _room(name)[1] == "worker"}


@pytest.mark.parametrize("name", FREE_OF_IO)
def test_what_decides_is_free_of_io(name: str) -> None:
    assert name in house.sources()
    assert name in house.pure()


@pytest.mark.parametrize("name", MODULES)
def test_a_foreign_library_has_one_home(name: str) -> None:
    for imported in imports(MODULES[name]):
        homes = HOMES.get(imported.split(".")[0])
        assert homes is None or {name, _room(name)[1]} & homes, f"{name} imports {imported}; its place is {homes}"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name
        for name, path in MODULES.items()
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def _reached(name: str) -> set[str]:
    """A module and all that it imports, also through others."""
    found, todo = set[str](), [name]
    while todo:
        if (one := todo.pop()) not in found:
            found.add(one)
            todo += own_imports(one)
    return found
