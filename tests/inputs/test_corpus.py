"""The program refuses each bad file with one line that names the file, the line, the field and a right value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inputs.corpus import Case, Result, cases, first_line, portward
from inputs.held import Held, hold
from portward.config.load import load_config

CONFIGS, PRESETS, INVENTORIES = cases("config"), cases("preset"), cases("inventory")
# Each of these crashed the process, or filled the memory, before the program had limits.
WORST = (
    "deep-maps.yaml", "merges-of-merges.yaml", "aliases-in-a-key.yaml", "aliases-in-an-id.yaml",
    "deep-objects.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    """A store that holds a policy; no test here may change it."""
    return hold(tmp_path_factory.mktemp("held"))


def name(case: Case) -> str:
    """The name of a case in a report."""
    return case.path.name


def refused(result: Result, case: Case, message: str) -> None:
    """Checks the exit code, and the first line on stderr."""
    assert result.code == 2
    line = first_line(result.stderr)
    assert (
        line.removeprefix("portward: ").replace(str(case.path), "FILE").replace(str(case.path.parent), "FOLDER")
        == message
    )


@pytest.mark.parametrize("case", [case for case in CONFIGS if case.expected], ids=name)
def test_a_bad_configuration_is_refused(case: Case) -> None:
    result = portward("check", "--config", str(case.path))
    refused(result, case, case.expected)
    # `check` reads the preset after the configuration, and prints first that the configuration is right.
    assert case.path.stem.startswith("preset-") or result.stdout == ""


@pytest.mark.parametrize("case", [case for case in CONFIGS if not case.expected], ids=name)
def test_a_configuration_that_looks_bad_is_taken(case: Case) -> None:
    assert load_config(case.path).segments == ("vni*",)


@pytest.mark.parametrize("case", [case for case in PRESETS if case.expected], ids=name)
def test_a_bad_preset_is_refused(case: Case) -> None:
    refused(portward("policy", "show", str(case.path)), case, case.expected)


@pytest.mark.parametrize("case", [case for case in PRESETS if not case.expected], ids=name)
def test_a_preset_that_looks_bad_is_taken(case: Case) -> None:
    result = portward("policy", "show", str(case.path))
    assert (result.code, result.stderr) == (0, "")
    assert "Our own policy" in result.stdout


@pytest.mark.parametrize("stem", ["deep-lists", "raw-escape", "escape-in-key", "workers-endless-digits"])
def test_check_says_the_same_in_a_process_of_its_own(stem: str) -> None:
    case = next(case for case in CONFIGS if case.path.stem == stem)
    program = [sys.executable, "-m", "portward", "check", "--config", str(case.path)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    refused(Result(result.returncode, result.stdout, result.stderr), case, case.expected)


@pytest.mark.parametrize("case", [case for case in INVENTORIES if case.expected], ids=name)
def test_a_bad_inventory_is_refused_and_changes_nothing(case: Case, held: Held) -> None:
    before = held.state()
    for more in ([], ["--dry-run"], ["--prune"]):
        result = portward("apply", *more, str(case.path), "--config", str(held.config))
        assert result.stdout == ""
        refused(result, case, case.expected)
    assert held.state() == before


@pytest.mark.parametrize("case", [case for case in INVENTORIES if not case.expected], ids=name)
def test_an_inventory_that_looks_bad_is_taken(case: Case, tmp_path: Path) -> None:
    """Its export can be applied again, and changes nothing."""
    held = hold(tmp_path)
    assert portward("apply", str(case.path), "--config", str(held.config)).code == 0
    revision, _, exported, _ = held.state()
    again = tmp_path / "export.yaml"
    again.write_text(exported)
    result = portward("apply", "--prune", str(again), "--config", str(held.config))
    assert result.stdout == f"nothing to change, the store stays at revision {revision}\n"


def test_a_good_inventory_does_change_the_store(tmp_path: Path) -> None:
    """The tests above compare the store's state, so a good inventory must change each part of it."""
    held = hold(tmp_path)
    before = held.state()
    path = tmp_path / "inventory.yaml"
    path.write_text("subscriptions: [{id: 11111111-0000-4000-8000-000000000009, offer: csp, created: 2020-01-01}]")
    assert portward("apply", str(path), "--config", str(held.config)).code == 0
    assert all(one != other for one, other in zip(before, held.state(), strict=True))


@pytest.mark.parametrize("case", [case for case in INVENTORIES if case.path.name in WORST], ids=name)
def test_apply_says_the_same_in_a_process_of_its_own(case: Case, held: Held) -> None:
    """With 2 GiB of address space, so that a file that fills the memory fails here, and not the machine."""
    program = [sys.executable, "-m", "portward", "apply", str(case.path), "--config", str(held.config)]
    limited = ["prlimit", f"--as={2 << 30}", *program]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    refused(Result(result.returncode, result.stdout, result.stderr), case, case.expected)
