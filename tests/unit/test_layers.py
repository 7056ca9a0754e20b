"""The cut of the package: imports run in one direction, and each foreign library has one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "agent" / "portward"

# From the top; a module imports from its own layer's folder and from those below.
LAYERS = (
    ("cli", "__main__"),
    ("lab",),
    ("daemon",),
    ("report", "answering", "linkfeed", "threads", "ending", "ticks", "vigil", "faults", "rounds"),
    (
        "core",
        "counting",
        "countsfile",
        "intake",
        "bulk",
        "dataplane",
        "underway",
        "check",
        "explanation",
        "sources",
        "diagnosis",
        "rules",
        "busiest",
        "casework",
        "behind",
        "enforced",
        "audit",
        "settings",
        "mistyped",
        "effect",
        "host",
    ),
    ("gateway",),
    ("table",),
    ("store",),
    ("fraud",),
    ("exemptions",),
    ("policy",),
    (
        "metrics",
        "metricsserver",
        "listeners",
        "snapshot",
        "scrape",
        "runtime",
        "locks",
        "ownership",
        "notify",
        "config",
        "paths",
        "sample",
        "selfcheck",
        "clock",
        "heartbeat",
    ),
    ("validity",),
    ("documents",),
    ("tomlsyntax",),
    ("addresses",),
    ("codes",),
    ("model", "resources", "descriptors", "endpoint", "language", "interfaces", "words"),
    ("limits",),
    ("errors", "__init__"),
    ("characters",),
)

# Library → the modules that may import it. Standard ones where a single place is wanted.
HOMES = {
    "lmdb": {"table.database"},
    "sqlite3": {"store.sqlite"},
    "inotify_simple": {"store.bell"},
    "netfilterqueue": {"gateway.single"},
    "prometheus_client": {"metrics"},
    "aiosmtpd": {"lab.mail"},
    "yaml": {"store.document"},
}


def modules() -> list[tuple[str, Path]]:
    """Dotted name within the package, and file."""
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in sorted(ROOT.rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> int:
    """The layer of a module, 0 at the top."""
    first = name.split(".", maxsplit=1)[0]
    for number, members in enumerate(LAYERS):
        if first in members:
            return number
    raise AssertionError(f"{name} stands in no layer: add it to the test, and to docs/architecture.md")


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_run_downwards(name: str, path: Path) -> None:
    for imported in imports(path):
        if imported.startswith("portward."):
            target = imported.removeprefix("portward.")
            if target.split(".")[0] == "__version__":
                continue
            assert layer(target) >= layer(name), f"{name} imports {imported}, which stands above it"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_foreign_library_has_one_home(name: str, path: Path) -> None:
    for imported in imports(path):
        homes = HOMES.get(imported.split(".")[0])
        assert homes is None or name in homes, f"{name} imports {imported}; its place is {homes}"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name
        for name, path in modules()
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent
