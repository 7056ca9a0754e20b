"""The name of an instance is a namespace, a file and a unit, so all three must accept it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from portward.base import instance
from portward.cli import rules
from portward.cli.program import app

# The longest name of a unit that systemd accepts, in characters (unit_name_is_valid).
MAX_UNIT = 255
BLUE = instance.Own("blue", "/etc/a b.toml")


@pytest.fixture(autouse=True)
def noted() -> Iterator[None]:
    """No other test gets the instance of one of these."""
    yield
    instance.note(None)


@pytest.mark.parametrize(
    "name", ["blue", "qrouter-0b5f41a2-6d0e-4d38-9f3a-1f8a0a3f7c11", "_a", "0", "a.b:c", "a..b"]
)
def test_a_name_of_a_namespace_that_a_unit_can_have_is_accepted(name: str) -> None:
    assert instance.problem(name) == ""


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "-a", "a b", "a\n", "a@b", "a\\x2db", "ä", "%i"]
)
def test_a_name_that_a_unit_escapes_or_that_leaves_the_folder_is_refused(name: str) -> None:
    assert f"{name!r} is no name of an instance: letters, digits" in instance.problem(name)


def test_the_hosts_own_file_is_the_file_of_no_instance() -> None:
    assert "because portward.toml is the file of the host's own agent" in instance.problem("portward")


def test_the_longest_name_is_that_of_the_longest_unit() -> None:
    longest = "a" * (MAX_UNIT - len("portward-baseline@.service"))
    assert instance.problem(longest) == ""
    assert instance.problem(f"{longest}a") == (
        "'aaaaaaaaaaaaaaaaaaaa'… is no name of an instance: it has 230 characters, and systemd takes 229 in the "
        "names of its units"
    )


def test_messages_name_unit_and_commands_of_the_hosts_own_agent() -> None:
    assert instance.unit() == "portward"
    assert instance.command("rules show") == "portward rules show"
    assert instance.command("apply --confirm") == "portward apply --confirm"
    assert instance.options() == []
    assert instance.noted() is None


def test_messages_name_unit_and_commands_of_the_instance() -> None:
    """The verbs on a store take no instance, but a configuration."""
    instance.note(BLUE)
    assert instance.unit() == "portward@blue"
    assert instance.command("rules show") == "portward rules show --instance blue"
    assert instance.command("apply --confirm") == "portward apply --confirm --config '/etc/a b.toml'"
    assert instance.options() == ["--instance", "blue", "/etc/a b.toml"]
    assert instance.noted() == BLUE


def test_the_verbs_that_take_an_instance_are_those_whose_commands_name_it() -> None:
    takes = set()
    for group in (app, *(each.typer_instance for each in app.registered_groups)):
        for one in group.registered_commands if group else ():
            assert one.callback is not None
            if "instance" in inspect.signature(one.callback).parameters:
                takes.add("rules" if group is rules.app else one.callback.__name__)
    assert takes == instance.GATEWAY_VERBS
