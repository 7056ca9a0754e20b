"""Paths that are no regular file, cannot be read, or never end are refused at once, with one line that names
them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from inputs.corpus import one_line, portward
from inputs.held import Held, hold
from inputs.test_corpus import INVENTORIES
from portward.config import files
from portward.inventory import files as inventory_files

PROGRAM: Final = (sys.executable, "-m", "portward")


@pytest.fixture
def held(tmp_path: Path) -> Held:
    """A store that holds a policy."""
    return hold(tmp_path)


def folder(path: Path) -> None:
    """A folder where a file should be."""
    path.mkdir()


def fifo(path: Path) -> None:
    """A pipe without a writer, which blocks a process that opens it."""
    os.mkfifo(path)


def zeros(path: Path) -> None:
    """A link to a device that never ends."""
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    """A socket."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fspath(path))


def circle(path: Path) -> None:
    """A symbolic link to itself."""
    path.symlink_to(path)


def missing(path: Path) -> None:
    """Nothing."""


def huge(path: Path) -> None:
    """A sparse file of one TiB, which takes no room on the disk."""
    path.touch()
    os.truncate(path, 1 << 40)


PLACES: Final[dict[Callable[[Path], None], tuple[str, str]]] = {
    # The messages about a TOML file, and about an inventory.
    folder: ("Is a directory", "Is a directory"),
    fifo: ("is a pipe; expected a file", "the document is empty"),
    zeros: ("is a device; expected a file", "is a device; expected a file"),
    unix_socket: ("No such device or address", "No such device or address"),
    circle: ("Too many levels of symbolic links", "Too many levels of symbolic links"),
    missing: ("No such file or directory", "No such file or directory"),
    huge: ("larger than 1 MiB, the most that is read", "larger than 256 MiB, the most that is read"),
}
made_by = pytest.mark.parametrize("make", PLACES, ids=lambda make: make.__name__)


@made_by
def test_a_configuration_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "at.toml"
    make(path)
    result = portward("check", "--config", str(path))
    assert (result.code, result.stdout) == (2, "")
    assert one_line(result.stderr) == f"portward: {path}: {PLACES[make][0]}"


@made_by
def test_a_preset_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "at.toml"
    make(path)
    result = portward("policy", "show", str(path))
    assert (result.code, result.stdout) == (2, "")
    assert one_line(result.stderr) == f"portward: {path}: {PLACES[make][0]}"


@made_by
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_an_inventory_that_is_no_file(make: Callable[[Path], None], ending: str, held: Held) -> None:
    before = held.state()
    path = held.store.with_name(f"at.{ending}")
    make(path)
    result = portward("apply", str(path), "--config", str(held.config))
    assert (result.code, result.stdout) == (2, "")
    message = (
        ":1: not JSON: Input data was truncated" if make is fifo and ending == "json" else f": {PLACES[make][1]}"
    )
    assert one_line(result.stderr) == f"portward: {path}{message}"
    assert held.state() == before


def test_a_file_that_may_not_be_read(held: Held) -> None:
    """Runs as a user that is not root, because root may read all files."""
    path = held.store.with_name("secret.yaml")
    path.write_text("subscriptions: []\n")
    path.chmod(0)
    program = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *PROGRAM, "apply", str(path)]
    result = subprocess.run(
        [*program, "--config", str(held.config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert one_line(result.stderr) == f"portward: {path}: Permission denied"


def test_a_name_is_printed_without_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m\n\u202e.yaml"
    result = portward("policy", "show", f"{path}.toml")
    assert result.code == 2
    assert (
        one_line(result.stderr) == f"portward: {tmp_path}/\\x1b[31m\\n\\u202e.yaml.toml: No such file or directory"
    )


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_what_is_piped_in_is_read_to_its_end(name: str, held: Held) -> None:
    """The input comes in two parts, with a pause between them."""
    pause = "import sys, time; print('subscriptions:', flush=True); time.sleep(0.3); print('- 5', flush=True)"
    with subprocess.Popen([sys.executable, "-c", pause], stdout=subprocess.PIPE) as writer:
        result = subprocess.run(
            [*PROGRAM, "apply", name, "--config", str(held.config)],
            stdin=writer.stdout, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    title = "standard input" if name == "-" else name
    assert one_line(result.stderr) == f"portward: {title}:2: subscriptions[0]: expected a table, got 5"


def test_standard_input_without_an_end_is_refused(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory_files, "_MAX_BYTES", 4 << 20)
    with Path("/dev/zero").open() as zero:
        monkeypatch.setattr(sys, "stdin", zero)
        result = portward("apply", "-", "--config", str(held.config))
    assert one_line(result.stderr) == "portward: standard input: larger than 4 MiB, the most that is read"


def test_a_file_of_just_the_largest_size_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MAX_TOML_BYTES", 100)
    path = tmp_path / "at.toml"
    for size, message in ((100, "name: is missing"), (101, "larger than 0 MiB")):
        path.write_text("#" + "x" * (size - 2) + "\n")
        assert message in one_line(portward("policy", "show", str(path)).stderr)


def test_the_corpus_is_large() -> None:
    assert len(INVENTORIES) > 200
