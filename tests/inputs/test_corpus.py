"""Each bad file is refused by the program with one line that names file, line, field and what would be right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inputs.corpus import Case, Result, cases, one_line, portward
from portward import config as configuration

CONFIGS, PRESETS = cases("config"), cases("preset")


def name(case: Case) -> str:
    """What a case is called in a report."""
    return case.path.stem


def refused(result: Result, case: Case, told: str) -> None:
    """The one line on stderr, and the exit code of bad input."""
    assert result.code == 2
    line = one_line(result.stderr)
    assert line.removeprefix("portward: ").replace(str(case.path), "FILE") == told


@pytest.mark.parametrize("case", [case for case in CONFIGS if case.told], ids=name)
def test_a_bad_configuration_is_refused(case: Case) -> None:
    result = portward("check", "--config", str(case.path))
    refused(result, case, case.told)
    # What is right is told before; of a preset that cannot be had, the configuration is.
    assert case.path.stem.startswith("preset-") or result.stdout == ""


@pytest.mark.parametrize("case", [case for case in CONFIGS if not case.told], ids=name)
def test_a_configuration_that_looks_bad_is_taken(case: Case) -> None:
    assert configuration.load(case.path).segments == ("vni*",)


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
