"""All names in CONTRIBUTING.md exist, and its recipes list the files that the code shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import house
from portward import __version__

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
RECIPES = dict(re.findall(r"(?ms)^### An? ([a-z ]+)$\n(.*?)(?=^###|\Z)", TEXT))


@pytest.mark.parametrize("recipe", ["store", "metric", "preset key", "verb", "reason code"])
def test_a_recipe_lists_the_files_that_the_code_says(recipe: str) -> None:
    steps = re.findall(r"(?m)^\d+\. `agent/portward/(.+?)` – ", RECIPES[recipe])
    assert sorted(steps) == sorted(house.edits(recipe))


def test_a_file_that_does_not_name_the_example_is_in_no_recipe() -> None:
    """Otherwise a recipe that lists every file would pass."""
    for recipe in RECIPES:
        assert len(house.edits(recipe)) < len(house.sources()) / 10


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "SECURITY.md"])
def test_every_path_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    paths = set(
        re.findall(r"`((?:agent|tests|docs|rules|systemd|package|\.ci)/[\w./-]+|[\w-]+\.(?:md|txt|toml))`", text)
    )
    assert paths
    assert not [path for path in paths - {"portward.toml"} if not (ROOT / path).exists()]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", TEXT)) - {"network"}))
def test_every_target_is_there(target: str) -> None:
    assert re.search(rf"(?m)^{target}:", MAKEFILE)


@pytest.mark.parametrize("command", re.findall(r"(?m)^\.venv/bin/pytest (\S+)", TEXT))
def test_every_test_that_is_shown_is_there(command: str) -> None:
    assert (ROOT / command).exists()


def test_every_suite_is_described() -> None:
    suites = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert suites == set(re.findall(r"(?m)^\| `tests/(\w+)` \|", TEXT))


def test_what_ci_runs_is_described() -> None:
    targets = re.findall(r"(?m)^\s*make ([a-z-]+)", (ROOT / ".ci" / "run").read_text())
    assert targets[-1] == "test", "CI ends with the summary of the tests"
    assert not [target for target in targets if f"`make {target}`" not in TEXT and f"make {target} " not in TEXT]


def test_the_hooks_run_what_make_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {hook["entry"].removeprefix(".venv/bin/") for hook in hooks}
    lint = re.search(r"(?m)^lint:.*\n((?:\t.*\n)+)", MAKEFILE)
    assert lint is not None
    commands = re.findall(r"\t\$\(BIN\)/(.*)", lint[1])
    assert {command.replace(" $(SPELLED)", "") for command in commands} == entries


def test_type_checkers_may_use_the_annotations() -> None:
    assert (ROOT / "agent" / "portward" / "py.typed").exists()


def test_the_changelog_has_a_section_for_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"(?m)^## \[(.+?)\]", text)[0] in ("Unreleased", __version__)
    kinds = set(re.findall(r"(?m)^### (.+)$", text))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
