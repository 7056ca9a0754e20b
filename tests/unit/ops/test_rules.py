"""The texts of `portward rules` and `portward status` about the kernel, for users who may read it and others."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from portward.cli import rules as verb
from portward.cli.program import app
from portward.config.keys import Config, OnAgentDown
from portward.dataplane import namespacelock, reconciler
from portward.dataplane.names import KernelTable
from portward.dataplane.queue_statistics import QueueStatistics
from portward.dataplane.setdump import SetElement
from portward.errors import KernelError, PortwardError
from portward.model import Mode
from portward.ops import host, rules
from unit.ops.test_host import bounds

CONFIG = Config(segments=("vni*",), uplinks=("up0",))


class Forbidden:
    """The kernel for a user without CAP_NET_ADMIN."""

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

    def __init__(self, comment: str | None, opens: tuple[str, ...] = ()) -> None:
        self._comment, self._opens = comment, opens
        self.table = KernelTable.INET

    def of(self, table: KernelTable) -> Held:
        """The same kernel, asked about this table."""
        found = Held(self._comment, self._opens)
        found.table = table
        return found

    def elements(self, _: str, set_: str) -> list[SetElement]:
        """The segments that the loaded ruleset leaves open, in the kernel's form."""
        assert set_ == "open_segments"
        keys = [key for pattern in self._opens for key in bounds(pattern)]
        return [SetElement(key, 0, 0) for key in keys]

    def rules_on(self, _: str, chain: str, set_: str) -> list[int]:
        """The rules are loaded."""
        assert (chain, set_) == ("screen", "deny4")
        return [7]

    def owned_table(self, _: str) -> str | None:
        """The comment of the lock."""
        return self._comment


@pytest.mark.parametrize("ask", [reconciler.loaded, reconciler.closed])
def test_without_cap_net_admin_the_error_names_it(ask: Any) -> None:
    with pytest.raises(KernelError, match="takes root or CAP_NET_ADMIN"):
        ask(Forbidden())


@pytest.mark.parametrize(
    ("loaded", "closed", "opens", "message"),
    [
        (
            True,
            False,
            (),
            "sources without a cached verdict are dropped, allowed or not; cached verdicts end within",
        ),
        (True, False, ("vni*",), "sources without a cached verdict pass, allowed or not; cached verdicts end"),
        (True, False, ("vni7",), "pass in vni7 and are dropped elsewhere, allowed or not; cached verdicts end"),
        (False, True, (), "no packet to port 25 is forwarded"),
        (True, True, (), "no packet to port 25 is forwarded"),
        (False, False, (), "NOTHING IS ENFORCED and port 25 is open"),
    ],
)
def test_without_an_agent_what_is_said_is_what_the_kernel_does(
    monkeypatch: pytest.MonkeyPatch, loaded: bool, closed: bool, opens: tuple[str, ...], message: str
) -> None:
    """The text follows the loaded ruleset, not the configuration, which may differ."""
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(None, opens))
    monkeypatch.setattr(reconciler, "loaded", lambda _: loaded)
    monkeypatch.setattr(reconciler, "closed", lambda _: closed)
    monkeypatch.setattr(rules, "states", list)
    for config in (CONFIG, replace(CONFIG, on_agent_down=OnAgentDown.OPEN), replace(CONFIG, mode=Mode.OBSERVE)):
        said = rules.without_agent(config)
        assert message in said
        assert said.endswith(" (start it: `systemctl start portward`)")


def test_while_workers_stay_unknown_sources_are_not_said_to_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(None))
    monkeypatch.setattr(reconciler, "loaded", lambda _: True)
    monkeypatch.setattr(reconciler, "closed", lambda _: False)
    monkeypatch.setattr(rules, "states", lambda: [QueueStatistics(0, 0, 0, 0)])
    two = replace(CONFIG, queue=replace(CONFIG.queue, workers=2))
    assert rules.without_agent(two) == (
        "1 of 2 workers that it left have their queue still, and go by the policy table as it was left; "
        "packets in the other queues get no verdict; once they end, sources without a cached verdict are dropped, "
        "allowed or not (start it: `systemctl start portward`)"
    )


def test_without_an_agent_and_the_privilege_the_enforcement_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "NfNetlink", Forbidden)
    assert rules.without_agent(CONFIG).startswith("it is not known what the kernel enforces: ")


@pytest.mark.parametrize(
    ("comment", "said"),
    [
        (
            "portward, process 4711",
            "runs already, as process 4711 by its own count, with another table folder: name",
        ),
        ("", "another program owns table inet portward_lock: end it"),
    ],
)
def test_without_an_agent_on_this_table_one_with_another_table_is_named(
    monkeypatch: pytest.MonkeyPatch, comment: str, said: str
) -> None:
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(comment))
    found = rules.without_agent(CONFIG)
    assert said in found
    assert "start it" not in found


@pytest.mark.parametrize(
    ("loaded", "comment", "message"),
    [
        (False, None, "no ruleset of portward is loaded here"),
        (True, "portward, process 4711", r"the agent runs \(process 4711 by its own count\).* stop it first"),
        (True, "other", "another program owns table inet portward_lock"),
    ],
)
def test_a_removal_that_cannot_work_is_refused_before_the_question(
    monkeypatch: pytest.MonkeyPatch, loaded: bool, comment: str | None, message: str
) -> None:
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(comment))
    monkeypatch.setattr(reconciler, "loaded", lambda _: loaded)
    monkeypatch.setattr(reconciler, "closed", lambda _: False)
    monkeypatch.setattr(namespacelock, "lasting_holder", namespacelock.holder)
    result = CliRunner().invoke(app, ["rules", "remove"])
    assert result.stdout == ""
    assert re.search(message, str(result.exception))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "standard input: is closed, so no answer can be read: use --yes"),
        (b"\xff\n", "stopped at the question: nothing was changed"),
        (b"n\n", "stopped at the question: nothing was changed"),
    ],
)
def test_an_answer_that_is_none_ends_in_a_line(
    monkeypatch: pytest.MonkeyPatch, given: bytes | None, message: str
) -> None:
    answer = None if given is None else io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", answer)
    monkeypatch.setattr(rules, "check_removable", lambda: None)
    with pytest.raises(PortwardError, match=re.escape(message)):
        verb.remove()


def test_what_libraries_write_to_standard_error_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Noisy:
        def listing(self, table: str) -> str:
            os.write(2, b"libxtables: unhandled NFPROTO in xtables_set_nfproto\n")
            return f"table {table} {{}}\n"

    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(None))
    monkeypatch.setattr(rules, "Nft", Noisy)
    monkeypatch.setattr(reconciler, "loaded", lambda _: True)
    monkeypatch.setattr(reconciler, "closed", lambda one: one.table is KernelTable.BRIDGE)
    assert rules.loaded(Path("portward.toml")) == (
        "table inet portward {}\ntable bridge portward {}\ntable bridge portward_closed {}\n"
    )
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


@pytest.mark.parametrize(
    ("opens", "config", "message"),
    [
        ((), CONFIG, ""),
        (("vni*",), replace(CONFIG, on_agent_down=OnAgentDown.OPEN), ""),
        (("vni*",), CONFIG, "leaves open vni* while no agent runs, the file no segment."),
        ((), replace(CONFIG, mode=Mode.OBSERVE), "leaves open no segment while no agent runs, the file vni*."),
    ],
)
def test_a_baseline_that_changes_nothing_says_what_is_loaded_against_the_file(
    monkeypatch: pytest.MonkeyPatch, opens: tuple[str, ...], config: Config, message: str
) -> None:
    monkeypatch.setattr(rules, "NfNetlink", lambda: Held(None, opens))
    monkeypatch.setattr(reconciler, "loaded", lambda _: True)
    monkeypatch.setattr(rules, "load_config", lambda _: config)
    said = rules.baseline(Path("portward.toml"))
    assert said.startswith("portward's ruleset is loaded already: nothing is changed")
    if message:
        assert f". It is not what portward.toml wants: it {message} An agent loads that when" in said
    else:
        assert said.endswith("nothing is changed")


def test_if_nothing_is_loaded_the_advice_to_start_an_agent_comes_only_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert str(host.nothing_loaded(tmp_path)).endswith("(start the agent: `systemctl start portward`)")
    monkeypatch.setattr(host, "running", lambda _: 7)
    assert str(host.nothing_loaded(tmp_path)).endswith("although an agent runs (process 7): see `portward status`")
