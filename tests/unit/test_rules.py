"""What `portward rules` and `portward status` say of the kernel, also where it may not be asked."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from portward import rules
from portward.cli.program import app
from portward.config import Config, OnAgentDown
from portward.errors import KernelError
from portward.gateway import keeper, namespacelock
from portward.gateway.queues import QueueState
from portward.model import Mode

CONFIG = Config(segments=("vni*",), uplinks=("up0",))


class Forbidden:
    """The kernel for who has no CAP_NET_ADMIN."""

    def sets(self, _: str) -> set[str]:
        """Is refused."""
        raise PermissionError

    def fingerprint(self, *_: object) -> bytes:
        """Is refused."""
        raise PermissionError

    def owned_table(self, _: str) -> str:
        """Is refused."""
        raise PermissionError


class Held:
    """A kernel in which another process holds the lock of the namespace, with this comment on it."""

    def __init__(self, comment: str | None) -> None:
        self._comment = comment

    def owned_table(self, _: str) -> str | None:
        """The comment."""
        return self._comment


@pytest.mark.parametrize("ask", [keeper.loaded, keeper.closed])
def test_who_may_not_ask_the_kernel_is_told_what_it_takes(ask: Any) -> None:
    with pytest.raises(KernelError, match="takes root or CAP_NET_ADMIN"):
        ask(Forbidden())


@pytest.mark.parametrize(
    ("loaded", "closed", "config", "told"),
    [
        (True, False, CONFIG, "unknown sources are dropped"),
        (True, False, Config(segments=("a",), uplinks=("b",), mode=Mode.OBSERVE), "unknown sources are passed"),
        (
            True,
            False,
            Config(segments=("a",), uplinks=("b",), on_agent_down=OnAgentDown.OPEN),
            "unknown sources are passed",
        ),
        (False, True, CONFIG, "no packet to port 25 is forwarded"),
        (True, True, CONFIG, "no packet to port 25 is forwarded"),
        (False, False, CONFIG, "NOTHING IS ENFORCED and port 25 is open"),
    ],
)
def test_without_an_agent_what_is_said_is_what_the_kernel_does(
    monkeypatch: pytest.MonkeyPatch, loaded: bool, closed: bool, config: Config, told: str
) -> None:
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(None))
    monkeypatch.setattr(keeper, "loaded", lambda _: loaded)
    monkeypatch.setattr(keeper, "closed", lambda _: closed)
    monkeypatch.setattr(rules, "states", list)
    assert told in rules.without_agent(config)


def test_while_workers_stay_unknown_sources_are_not_said_to_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(None))
    monkeypatch.setattr(keeper, "loaded", lambda _: True)
    monkeypatch.setattr(keeper, "closed", lambda _: False)
    monkeypatch.setattr(rules, "states", lambda: [QueueState(0, 0, 0, 0)])
    assert rules.without_agent(CONFIG).startswith("the workers that it left still answer")


def test_without_an_agent_who_may_not_ask_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "NfNetlink", Forbidden)
    assert rules.without_agent(CONFIG).startswith("what the kernel enforces is not known: ")


@pytest.mark.parametrize(
    ("comment", "said"),
    [("portward, process 4711", "runs already, as process 4711"), ("", "another program owns table")],
)
def test_without_an_agent_on_this_table_one_with_another_table_is_named(
    monkeypatch: pytest.MonkeyPatch, comment: str, said: str
) -> None:
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(comment))
    assert said in rules.without_agent(CONFIG)


@pytest.mark.parametrize(
    ("loaded", "comment", "told"),
    [
        (False, None, "no ruleset of portward is loaded here"),
        (True, "portward, process 4711", r"the agent runs \(process 4711 by its own count\).* stop it first"),
        (True, "other", "another program owns table inet portward_lock"),
    ],
)
def test_what_cannot_be_removed_is_said_before_anybody_is_asked(
    monkeypatch: pytest.MonkeyPatch, loaded: bool, comment: str | None, told: str
) -> None:
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(comment))
    monkeypatch.setattr(keeper, "loaded", lambda _: loaded)
    monkeypatch.setattr(keeper, "closed", lambda _: False)
    monkeypatch.setattr(namespacelock, "lasting_holder", namespacelock.holder)
    result = CliRunner().invoke(app, ["rules", "remove"])
    assert result.stdout == ""
    assert re.search(told, str(result.exception))


def test_what_libraries_write_to_standard_error_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Noisy:
        def listing(self, table: str) -> str:
            os.write(2, b"libxtables: unhandled NFPROTO in xtables_set_nfproto\n")
            return f"table {table} {{}}\n"

    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(None))
    monkeypatch.setattr(rules, "Nft", Noisy)
    monkeypatch.setattr(keeper, "loaded", lambda _: True)
    monkeypatch.setattr(keeper, "closed", lambda _: False)
    assert rules.loaded() == "table inet portward {}\n"
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"
