"""Each purpose has a file of locked packages, and running portward needs only one of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
RUN = "requirements.txt"
# The files for one environment. The documents are built in another one.
FILES = [RUN, *(f"requirements-{extra}.txt" for extra in sorted(EXTRAS.keys() - {"lab"}))]


def locked(name: str) -> dict[str, str]:
    """Package → version of a file. Fails if an entry has no hash."""
    entries = re.findall(
        r"(?m)^([a-z0-9-]+)==(\S+) \\\n(?:    --hash=sha256:[0-9a-f]{64})", (ROOT / name).read_text()
    )
    assert len(entries) == len(re.findall(r"(?m)^[a-zA-Z0-9]", (ROOT / name).read_text())), f"{name}: no hash"
    return dict(entries)


def satisfied(wanted: list[str], *names: str) -> None:
    """Asserts that the files lock a version that each requirement allows."""
    pinned = {package: version for name in names for package, version in locked(name).items()}
    for requirement in map(Requirement, wanted):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_program_its_lab_and_its_build_need_one_file() -> None:
    satisfied(PROJECT["project"]["dependencies"] + EXTRAS["lab"] + PROJECT["build-system"]["requires"], RUN)


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"lab"}))
def test_each_other_purpose_has_a_file_beside_it(extra: str) -> None:
    satisfied(EXTRAS[extra], RUN, f"requirements-{extra}.txt")


def test_the_oldest_libraries_are_tried_as_the_bounds_say() -> None:
    bounds = {
        canonicalize_name(requirement.name): specifier.version
        for requirement in map(Requirement, PROJECT["project"]["dependencies"])
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    lowest = locked("requirements-lowest.txt")
    assert lowest.keys() == bounds.keys()
    assert {name: Version(version) for name, version in lowest.items()} == {
        name: Version(version) for name, version in bounds.items()
    }


def test_a_package_has_the_same_version_in_every_file() -> None:
    pinned: dict[str, str] = {}
    for name in FILES:
        for package, version in locked(name).items():
            assert pinned.setdefault(package, version) == version, f"{name}: {package}"


def test_the_fuzzer_and_the_tests_are_not_what_the_demo_installs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"(?m)^demo: program ##", makefile)
    assert re.search(r"(?m)^program: packages \$\(VENV\)/ready ##", makefile)
    assert not locked(RUN).keys() & {"atheris", "pytest", "hypothesis", "mypy", "ruff"}
