"""Each bad file is refused by the program with one line that names file, line, field and what would be right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inputs.corpus import Case, Result, cases, first_line, portward
from inputs.held import Held, hold
from portward.config.load import load_config

CONFIGS, PRESETS, INVENTORIES = cases("config"), cases("preset"), cases("inventory")
# Each of these ended the process, or filled the memory, before it was bounded.
WORST = (
    "deep-maps.yaml", "merges-of-merges.yaml", "aliases-in-a-key.yaml", "aliases-in-an-id.yaml",
    "deep-objects.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    """A store that holds a policy; no test here may change it."""
    return hold(tmp_path_factory.mktemp("held"))


def name(case: Case) -> str:
    """What a case is called in a report."""
    return case.path.name


def refused(result: Result, case: Case, told: str) -> None:
    """The first line on stderr, and the exit code of bad input."""
    assert result.code == 2
    line = first_line(result.stderr)
    assert (
        line.removeprefix("portward: ").replace(str(case.path), "FILE").replace(str(case.path.parent), "FOLDER")
        == told
    )


@pytest.mark.parametrize("case", [case for case in CONFIGS if case.told], ids=name)
def test_a_bad_configuration_is_refused(case: Case) -> None:
    result = portward("check", "--config", str(case.path))
    refused(result, case, case.told)
    # What is right is told before; of a preset that cannot be had, the configuration is.
    assert case.path.stem.startswith("preset-") or result.stdout == ""


@pytest.mark.parametrize("case", [case for case in CONFIGS if not case.told], ids=name)
def test_a_configuration_that_looks_bad_is_taken(case: Case) -> None:
    assert load_config(case.path).segments == ("vni*",)


@pytest.mark.parametrize("case", [case for case in PRESETS if case.told], ids=name)
def test_a_bad_preset_is_refused(case: Case) -> None:
    refused(portward("policy", "show", str(case.path)), case, case.told)


@pytest.mark.parametrize("case", [case for case in PRESETS if not case.told], ids=name)
def test_a_preset_that_looks_bad_is_taken(case: Case) -> None:
    result = portward("policy", "show", str(case.path))
    assert (result.code, result.stderr) == (0, "")
    assert "Our own policy" in result.stdout


@pytest.mark.parametrize("stem", ["deep-lists", "raw-escape", "escape-in-key", "workers-endless-digits"])
def test_check_says_the_same_in_a_process_of_its_own(stem: str) -> None:
    case = next(case for case in CONFIGS if case.path.stem == stem)
    program = [sys.executable, "-m", "portward", "check", "--config", str(case.path)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    refused(Result(result.returncode, result.stdout, result.stderr), case, case.told)


@pytest.mark.parametrize("case", [case for case in INVENTORIES if case.told], ids=name)
def test_a_bad_inventory_is_refused_and_changes_nothing(case: Case, held: Held) -> None:
    before = held.state()
    for more in ([], ["--dry-run"], ["--prune"]):
        result = portward("apply", *more, str(case.path), "--config", str(held.config))
        assert result.stdout == ""
        refused(result, case, case.told)
    assert held.state() == before


@pytest.mark.parametrize("case", [case for case in INVENTORIES if not case.told], ids=name)
def test_an_inventory_that_looks_bad_is_taken(case: Case, tmp_path: Path) -> None:
    """And what it made is exported and taken back without a difference."""
    held = hold(tmp_path)
    assert portward("apply", str(case.path), "--config", str(held.config)).code == 0
    revision, _, exported, _ = held.state()
    again = tmp_path / "export.yaml"
    again.write_text(exported)
    result = portward("apply", "--prune", str(again), "--config", str(held.config))
    assert result.stdout == f"nothing to change, the store stays at revision {revision}\n"


def test_a_good_inventory_does_change_the_store(tmp_path: Path) -> None:
    """What the tests above compare can differ."""
    held = hold(tmp_path)
    before = held.state()
    path = tmp_path / "inventory.yaml"
    path.write_text("subscriptions: [{id: 11111111-0000-4000-8000-000000000009, offer: csp, created: 2020-01-01}]")
    assert portward("apply", str(path), "--config", str(held.config)).code == 0
    assert all(one != other for one, other in zip(before, held.state(), strict=True))


@pytest.mark.parametrize("case", [case for case in INVENTORIES if case.path.name in WORST], ids=name)
def test_apply_says_the_same_in_a_process_of_its_own(case: Case, held: Held) -> None:
    """In 2 GiB of address space: what fills the memory fails here and not on the machine."""
    program = [sys.executable, "-m", "portward", "apply", str(case.path), "--config", str(held.config)]
    limited = ["prlimit", f"--as={2 << 30}", *program]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    refused(Result(result.returncode, result.stdout, result.stderr), case, case.told)
