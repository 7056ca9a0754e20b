"""The command line's own promises: help with an example for each verb, one line for an error, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
from typer.main import get_command

from portward.cli.program import app


def verbs(group: typer.Typer = app, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All verbs, with the groups that they are in."""
    for info in group.registered_commands:
        assert info.callback is not None
        yield (*prefix, info.name or info.callback.__name__)
    for sub in group.registered_groups:
        assert sub.typer_instance is not None
        yield from verbs(sub.typer_instance, (*prefix, sub.name or ""))


def portward(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program."""
    return subprocess.run(
        [sys.executable, "-m", "portward", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_verbs_are_those_that_are_promised() -> None:
    found = {" ".join(verb) for verb in verbs()}
    assert found == {
        "run", "check", "apply", "export", "audit", "explain", "diagnose", "status", "top", "rules show",
        "rules baseline", "rules remove", "exemption request", "exemption grant", "exemption reject",
        "exemption limit", "exemption revoke", "exemption list", "exemption show", "exemption history",
        "attachment started", "policy list", "policy show", "lab up", "lab down", "lab demo",
    }  # fmt: skip


@pytest.mark.parametrize("verb", list(verbs()), ids=" ".join)
def test_help_shows_an_example_of_the_verb_itself(verb: tuple[str, ...]) -> None:
    command = get_command(app)
    for word in verb:
        command = command.commands[word]  # type: ignore[attr-defined] # a group, until the last word
    assert command.help is not None
    assert f"Example: portward {' '.join(verb)}" in " ".join(command.help.split())


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("explain", "vni1", "10.0.0.4", "--config", "/nowhere.toml"), 2, "/nowhere.toml: No such file"),
        (("check", "--config", "/nowhere.toml"), 2, "/nowhere.toml"),
        (("policy", "show", "azur-2020"), 2, "did you mean 'azure-2020'"),
    ],
)
def test_an_error_is_one_line_on_stderr(arguments: tuple[str, ...], code: int, told: str) -> None:
    result = portward(*arguments)
    assert result.returncode == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("portward: ")
    assert told in result.stderr


def test_the_short_way_to_run_says_what_the_long_one_says() -> None:
    short, long = portward("run", "--config", "/nowhere.toml"), portward("run", "--config=/nowhere.toml")
    assert (short.returncode, short.stderr) == (long.returncode, long.stderr)
    assert short.stderr.startswith("portward: /nowhere.toml")


def test_the_short_way_to_run_loads_no_library_for_command_lines() -> None:
    look = (
        "import sys; sys.argv[1:] = ['run', '--config', '/nowhere.toml']\n"
        "from portward.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('typer' in sys.modules, 'portward.daemon' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert result.stdout == "False True\n"


def test_bad_usage_is_exit_code_2() -> None:
    assert portward("explain").returncode == 2
    assert portward("explian").returncode == 2


def test_the_version_is_printed() -> None:
    assert portward("--version").stdout.startswith("portward 0.")


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    argv = [sys.executable, "-m", "portward", "policy", "show", "azure-2020"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert "Traceback" not in result.stderr
    assert result.returncode == 1
