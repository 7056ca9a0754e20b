"""Messages name the unit and the commands of the agent that they are about: the host's own, or an instance."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

import house
from portward.base import instance, netns, ownership
from portward.cli import status_text
from portward.config.keys import Config
from portward.daemon import settings
from portward.dataplane import namespacelock, reconciler
from portward.ops import check, effect, explanation, host, rules
from portward.ops.behind import Behind
from portward.ops.diagnosis import suggestion
from portward.ops.diagnosis.accounts import Accounts
from portward.ops.effect import Effect, Handling, Now, Policy
from portward.ops.host_state import Agent, CachedState, Host, Ruleset, Workers
from portward.table.damage import Damage
from portward.table.database import open_database

BLUE = instance.Own("blue", "/etc/portward/blue.toml")
CONFIG = Config(segments=("vni*",), uplinks=("up0",))
PART, CLOSED = Host(workers=Workers.PART), Host(agent=Agent.NONE, ruleset=Ruleset.CLOSED, workers=Workers.NONE)
ALLOW, NOTHING = Policy(verdict="allow"), CachedState()
HELD = {"revision": 3, "flipped": 2, "subscriptions": 3}
RELOAD = {"step": "reload", "error": "oops", "times": 2, "seconds": 9}

# A command that works on one agent, or on its unit, as a message writes it.
_COMMAND = re.compile(
    rf"`(?:sudo )?(?:portward ({'|'.join(sorted(instance.GATEWAY_VERBS))}|apply|export)\b|systemctl \w+ portward)"
)
# Files and texts about the host's own agent, about any agent, or of verbs on a store, which know no instance.
_OTHERS = (
    "cli/", "config/", "exemptions/", "store/", "lab/", "inventory/",
    "ops/diagnosis/answer.py: provider: find out what happens to it, with `portward diagnose SEGMENT ADDRESS` on",
)  # fmt: skip


@pytest.fixture(autouse=True)
def noted() -> Iterator[None]:
    """No other test gets the instance of one of these."""
    yield
    instance.note(None)


def texts(tree: ast.Module) -> Iterator[str]:
    """The texts of a module, without its docstrings. The parts of an f-string are joined; a value is `…`."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def test_no_message_writes_such_a_command_itself() -> None:
    found = [
        f"{name}: {text}"
        for name, source in house.sources().items()
        for text in texts(ast.parse(source))
        if _COMMAND.search(text)
    ]
    assert [line for line in found if not line.startswith(_OTHERS)] == []


def _without_agent(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(rules, "NfNetlink", lambda: None)
    patch.setattr(namespacelock, "holder", lambda _: None)
    patch.setattr(reconciler, "closed", lambda _: True)
    return rules.without_agent(CONFIG)


def _nothing_loaded(patch: pytest.MonkeyPatch, process: int | None) -> str:
    patch.setattr(host, "in_another_network", lambda _: None)
    patch.setattr(host, "running", lambda _: process)
    return str(host.nothing_loaded(Path("/nowhere")))


def _no_table(_: pytest.MonkeyPatch) -> str:
    with pytest.raises(Exception, match="there is no policy table here") as caught:
        open_database(Path("/nowhere"), write=False)
    return str(caught.value)


def _remedy(verdict: str, now: Now, place: Handling) -> str:
    found = explanation.Explanation(
        segment="vni1", address="10.0.0.4", destination=None, verdict=verdict, reason="allowed-offer",
        reason_in_words="", subscription=None, name=None, offer=None, matched=None, rule="", revision=1,
        decided_from="", observed=False, kernel="", remedy="",
    )  # fmt: skip
    return explanation._remedy(found, place, now)


def _unreadable(_: pytest.MonkeyPatch) -> str:
    return "\n".join(status_text.unreadable({"number": 1, "first": []}))


def _hint(who: str) -> str:
    return suggestion.hint(CONFIG, cast("Accounts", Nameless()), who)


class Nameless:
    """Accounts without a name."""

    def names(self) -> list[str]:
        """None."""
        return []


def _others_open(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(ownership, "look", lambda _: Found())
    return "\n".join(check._ownership(Path("/nowhere")))


class Found:
    """A table that others may open."""

    refused = ()
    open = ((Path("/nowhere"), 0o700),)


MESSAGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], str], str]] = {
    "a part of the queues": (lambda _: effect.now(PART, NOTHING, ALLOW).why, "status --instance blue"),
    "closed": (lambda _: effect.now(CLOSED, NOTHING, ALLOW).why, "rules show --instance blue"),
    "dropped against the policy": (
        lambda _: _remedy("allow", Now(Effect.DROPPED, "", as_policy=False), Handling.BY_POLICY),
        "status --instance blue",
    ),
    "may be dropped": (
        lambda _: _remedy("allow", Now(Effect.PASSES, "", as_policy=True), Handling.UNANSWERED),
        "status --instance blue",
    ),
    "behind": (lambda _: host.not_taken_in("x"), "status --instance blue"),
    "nothing loaded, an agent runs": (lambda patch: _nothing_loaded(patch, 7), "status --instance blue"),
    "nothing loaded": (lambda patch: _nothing_loaded(patch, None), "systemctl start portward@blue"),
    "closed, without an agent": (_without_agent, "rules show --instance blue"),
    "the unit, without an agent": (_without_agent, "systemctl start portward@blue"),
    "no table": (_no_table, "systemctl restart portward@blue"),
    "reload fails": (lambda _: status_text.failing(RELOAD), "systemctl reload portward@blue"),
    "held": (
        lambda _: "\n".join(status_text._held(HELD)),
        "portward apply --confirm --config /etc/portward/blue.toml",
    ),
    "unreadable records": (_unreadable, "check --instance blue"),
    "an address": (lambda _: _hint("10.0.0.4"), "diagnose SEGMENT 10.0.0.4 --instance blue"),
    "a segment": (lambda _: _hint("vni77"), "diagnose vni77 ADDRESS --instance blue"),
    "no name": (lambda _: _hint("fabrikam"), "export --config /etc/portward/blue.toml"),
    "others may open": (_others_open, "run --instance blue"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_about_an_instance_names_its_unit_or_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, command = MESSAGES[name]
    own = message(monkeypatch)
    assert command not in own
    instance.note(BLUE)
    assert f"{command}`" in message(monkeypatch)
    assert own == message(monkeypatch).replace(" --instance blue", "").replace(
        "portward@blue", "portward"
    ).replace(f" --config {BLUE.config}", ""), "the rest is the same"


def test_a_damaged_row_is_logged_with_the_command_for_the_instance(caplog: pytest.LogCaptureFixture) -> None:
    instance.note(BLUE)
    with caplog.at_level(logging.ERROR):
        Damage().found("a row")
    assert "`portward check --instance blue` says what to do" in caplog.text


def test_a_worker_of_an_instance_names_the_unit_of_the_instance(tmp_path: Path) -> None:
    """A worker is a process of its own, to which the agent passes the instance."""
    instance.note(BLUE)
    argv = [
        sys.executable, "-m", "portward.worker.process", "--queue", "0", "--table", str(tmp_path / "none"),
        "--counters", "1", "--lifeline", "0", *instance.options(),
    ]  # fmt: skip
    done = subprocess.run(argv, input="\n", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("(`systemctl restart portward@blue`)\n")


def test_a_verb_on_a_store_names_the_instance_whose_agent_has_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a verb enters no namespace, so it notes no instance."""
    monkeypatch.setattr(settings, "in_another_network", lambda _: 4711)
    monkeypatch.setattr(netns, "name_of", lambda process: "blue" if process == 4711 else "")
    assert settings.asking(Path("/nowhere")) == "portward status --instance blue"
    held = Behind(3, 0, 1, settings.asking(Path("/nowhere")))
    assert str(held) == "NOT in force here yet: revision 3 is held, see `portward status --instance blue`"
    monkeypatch.setattr(netns, "name_of", lambda _: "a b")
    assert settings.asking(Path("/nowhere")) == "portward status", "no unit can have that name"
    monkeypatch.setattr(settings, "in_another_network", lambda _: None)
    assert settings.asking(Path("/nowhere")) == "portward status"
