"""The committed reference pages equal those made from the code, and the JSON of verbs has the keys that they
name."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from package import reference
from package.reference.output import VERBS
from package.reference.policy import EXAMPLE
from package.reference.tables import MEANINGS
from typer.testing import CliRunner

from portward.cli.program import app
from portward.daemon import status
from portward.inventory.difference import check_offers, check_references
from portward.inventory.files import read_inventory
from portward.policy import presets

FOLDER = Path(__file__).resolve().parents[2] / "docs/reference"
PAGES = reference.pages()
FABRIKAM = "11111111-0000-4000-8000-000000000002"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_gives_now(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name], "run `make docs`, or python -m package.reference"


def test_every_page_of_the_folder_is_made() -> None:
    assert {path.name for path in FOLDER.glob("*.md")} == set(PAGES)


def test_the_inventory_that_is_shown_is_accepted() -> None:
    inventory = read_inventory([str(EXAMPLE)])
    check_offers(inventory, presets.load(presets.DEFAULT))
    check_references({}, inventory, prune=False)
    assert len(inventory.records) == 3


class Lab:
    """A store of its own, on which verbs run."""

    def __init__(self, folder: Path) -> None:
        self._config = folder / "portward.toml"
        self._config.write_text(
            f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{folder}/s.db"\ntable = "{folder}/table"\n'
        )

    def run(self, *words: str) -> list[Any]:
        """The JSON values that a verb prints, one for each line."""
        done = CliRunner().invoke(app, [*words, "--json", "--config", str(self._config)], catch_exceptions=False)
        lines = done.stdout.splitlines()
        return [json.loads(line) for line in lines] if words[0] != "export" else [json.loads(done.stdout)]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A store that holds the inventory of the page."""
    made = Lab(tmp_path)
    made.run("apply", str(EXAMPLE))
    return made


def keys(verb: str, printed: dict[str, Any]) -> None:
    """Asserts that a verb prints the keys on the page. Those with `?` may be missing."""
    said = MEANINGS[verb]
    assert (
        {key for key in said if not key.startswith("?")} <= set(printed) <= {key.removeprefix("?") for key in said}
    )


def test_the_verbs_print_the_keys_that_the_page_names(lab: Lab) -> None:
    [dry] = lab.run("apply", "--dry-run", "--prune", str(EXAMPLE))
    keys("apply", dry)
    assert {"held", "changes"} <= set(dry)
    [confirmed] = lab.run("apply", "--confirm")
    keys("apply --confirm", confirmed)
    [exported] = lab.run("export")
    keys("export", exported)
    [checked] = lab.run("audit")
    keys("audit", checked)
    assert "entries" in checked
    [revoked] = lab.run("exemption", "revoke", FABRIKAM, "--reason", "spam")
    keys("exemption request", revoked)
    [started] = lab.run("attachment", "started", "vni1002", "10.0.0.4")
    keys("attachment started", started)
    [many] = lab.run("exemption", "revoke", "--offer", "pay-as-you-go", "--confirm", "0", "--reason", "spam")
    keys("exemption revoke --offer", many)
    [listed] = lab.run("exemption", "list")
    keys("exemption list", listed)
    assert lab.run("exemption", "show", FABRIKAM) == [listed]
    for each in lab.run("exemption", "history", FABRIKAM):
        keys("exemption history", each)
    [found] = lab.run("policy", "list")
    for preset in found:
        keys("policy list", preset)


def test_the_page_names_every_key_of_the_status() -> None:
    """A status needs a running agent, so this test reads the keys from the source."""
    written = {one for function in status.PARTS for one in _keys_in(function)}
    # The verb itself adds these two.
    assert {key.removeprefix("?") for key in MEANINGS["status"]} == written | {"newest", "remarks"}


def _keys_in(function: object) -> set[str]:
    """The keys of the dict that a function returns, and those that it puts into one afterwards."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type] # a function
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            found |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            place = node.targets[0].slice
            found |= {place.value} if isinstance(place, ast.Constant) and isinstance(place.value, str) else set()
    return found


def test_the_page_has_every_verb_that_takes_json() -> None:
    texts = PAGES["commands.md"].split("\n## ")
    taking = {text.splitlines()[0].removeprefix("portward ") for text in texts if "`--json`" in text}
    of_one = {"exemption grant", "exemption reject", "exemption limit", "exemption revoke", "exemption show"}
    assert taking - of_one == set(VERBS) - {"apply --confirm", "exemption revoke --offer"} | {
        "explain",
        "diagnose",
        "policy show",
    }
