"""The command line has help with an example for each verb, one line for an error, and fixed exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from portward.cli import program, usage
from portward.cli.program import app
from portward.errors import InputError


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


@pytest.mark.parametrize("verb", list(verbs()), ids=" ".join)
def test_help_names_what_an_option_or_an_argument_takes(verb: tuple[str, ...]) -> None:
    """It uses words like NAME or SECONDS, not typer's own, which are Python types: <str>, <float range>."""
    command = get_command(app)
    for word in verb:
        command = command.commands[word]  # type: ignore[attr-defined] # a group, until the last word
    for one in command.params:
        if not getattr(one, "is_flag", False):
            assert one.metavar is not None, one.name
            assert re.fullmatch(r"[A-Z:|]+", one.metavar)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("explain", "vni1", "10.0.0.4", "--config", "/nowhere.toml"), 2, "/nowhere.toml: No such file"),
        (("check", "--config", "/nowhere.toml"), 2, "/nowhere.toml"),
        (("status", "--instance", "../blue"), 2, "--instance: '../blue' is no name of an instance: "),
        (("run", "--instance", "no-such-space"), 2, "--instance: there is no network namespace 'no-such-space'"),
        (("policy", "show", "azur-2020"), 2, "did you mean 'azure-2020'"),
        (
            ("expalin",),
            2,
            "no such command 'expalin'; did you mean 'explain', 'exemption'? (see `portward --help`)",
        ),
        (("a\nb",), 2, "no such command 'a\\nb'"),
        (("run", "--bogus"), 2, "no such option: --bogus (see `portward run --help`)"),
        (("run", "/nowhere.toml"), 2, "unexpected argument: /nowhere.toml"),
        (("explain", "vni1"), 2, "ADDRESS: is missing"),
        (("exemption", "reject", "x"), 2, "--reason: is missing"),
        (("exemption", "limit", "x", "--rate", "0"), 2, "--rate: expected a number of at least 1 "),
        (("exemption", "limit", "x", "--rate", "1000001"), 2, "--rate: expected a number of at most 1000000 "),
        (("exemption", "limit", "x", "--rate", "many"), 2, "--rate: expected a whole number "),
        (("exemption", "list", "--state", "gone"), 2, "--state: 'gone' is not one of 'none', 'requested'"),
        (("top", "--interval", "often"), 2, "--interval: expected a number "),
    ],
)
def test_an_error_is_one_line_on_stderr(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = portward(*arguments)
    assert result.returncode == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("portward: ")
    assert message in result.stderr


def test_an_unreadable_file_gives_the_same_error_as_any_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """typer must not check the file first, because it would print a message of its own."""
    path = tmp_path / "portward.toml"
    path.write_text("segmants = 1\n")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(sys, "argv", ["portward", "status", "--config", str(path)])
    with pytest.raises(InputError, match="segmants: unknown key"):
        usage.run(program.app)


@pytest.mark.parametrize("words", [(), ("policy",), ("policy", "list"), ("explain",)], ids=" ".join)
def test_help_is_had_as_operators_ask_for_it(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["portward", *arguments])
        assert usage.run(program.app) == 0
        return capsys.readouterr().out

    long = shown(*words, "--help")
    assert "Usage: " + " ".join(("portward", *words)) in long
    assert shown(*words, "-h") == shown("help", *words) == long


def test_a_group_without_a_verb_shows_its_help() -> None:
    result = portward("exemption")
    assert result.returncode == 2
    assert "Commands:" in result.stderr


def test_output_to_a_full_disk_is_an_error_of_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "portward", "policy", "list"],
            stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "portward: standard output: No space left on device\n"


def test_an_interrupt_leaves_no_traceback() -> None:
    """This includes an interrupt while libraries are loaded, which takes most of the time of a short verb."""
    look = (
        "import sys, builtins; sys.argv[1:] = ['policy', 'list']\n"
        "from portward.cli import main\n"
        "load = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize("answer", ["", "n\n"])
def test_a_question_that_is_not_answered_by_yes_changes_nothing(answer: str) -> None:
    """The line with the question is ended in every case."""
    look = (
        "import sys; sys.argv[1:] = ['rules', 'remove']\n"
        "from portward.ops import rules\n"
        "from portward.cli import main\n"
        "rules.check_removable = lambda: None\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", look], input=answer, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert result.stdout.endswith("[y/N]: \n")
    assert result.stderr == "portward: stopped at the question: nothing was changed\n"


def test_the_short_way_to_run_says_what_the_long_one_says() -> None:
    short, long = portward("run", "--config", "/nowhere.toml"), portward("run", "--config=/nowhere.toml")
    assert (short.returncode, short.stderr) == (long.returncode, long.stderr)
    assert short.stderr.startswith("portward: /nowhere.toml")


@pytest.mark.parametrize(
    "words",
    [("run", "--config", "/nowhere.toml"), ("run", "--instance", "own")],
    ids=["configuration", "instance"],
)
def test_the_short_way_to_run_loads_no_library_for_command_lines(words: tuple[str, ...]) -> None:
    look = (
        f"import sys; sys.argv[1:] = {list(words)}\n"
        "from portward.base import netns\n"
        "netns.is_own = lambda name: name == 'own'\n"
        "from portward.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('typer' in sys.modules, 'portward.daemon.composition' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert result.stdout == "False True\n"


def test_the_verbs_about_one_gateway_take_an_instance() -> None:
    """The verbs on the store take none: a store may serve many gateways."""
    taking = set()
    for verb in verbs():
        command = get_command(app)
        for word in verb:
            command = command.commands[word]  # type: ignore[attr-defined] # a group, until the last word
        if any("--instance" in one.opts for one in command.params):
            taking.add(" ".join(verb))
    assert taking == {
        "run", "check", "explain", "diagnose", "status", "top", "rules show", "rules baseline", "rules remove",
    }  # fmt: skip


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
