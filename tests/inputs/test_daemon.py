"""A running gateway that reads bad input keeps enforcing the old policy, and logs the reason in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from inputs.corpus import HERE, cases, one_line
from inputs.rows import row, write_rows
from portward.base.characters import unshown
from portward.lab.agent import Agent, until
from portward.lab.demo import records
from portward.lab.topology import CONTOSO, FABRIKAM, Lab
from portward.model import Attachment, Subscription
from portward.store.codec import key_of

pytestmark = pytest.mark.kernel

RECORDS = {case.path.stem: case for case in cases("records")}
CONFIGS = {case.path.stem: case for case in cases("config")}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A gateway without an agent."""
    with Lab(f"pwi{os.getpid()}", (CONTOSO, FABRIKAM)) as found:
        yield found


@pytest.fixture
def agent(lab: Lab, tmp_path: Path) -> Iterator[Agent]:
    """An agent that enforces the demo's policy."""
    found = Agent(lab, tmp_path)
    found.apply(*records())
    found.start()
    yield found
    found.stop()
    found.portward("rules", "remove", "--yes")


def verdicts(agent: Agent) -> list[str]:
    """The reason codes of both customers, from `portward explain`."""
    return [agent.explain(each.segment, each.address4)["reason"] for each in (CONTOSO, FABRIKAM)]


def complaints(agent: Agent, word: str) -> list[str]:
    """The lines of the log that contain a word."""
    return [line for line in agent.log.read_text().split("\n") if word in line]


def test_bad_rows_are_refused_and_the_good_one_among_them_is_enforced(agent: Agent) -> None:
    """All bad rows at once, but only one for each key."""
    before = verdicts(agent)
    attachment = next(record for record in records() if isinstance(record, Attachment))
    good = f'{{"segment":"{FABRIKAM.segment}","address":"192.0.2.7","subscription":"{attachment.subscription}"}}'
    bad = [case.path.read_text() for case in RECORDS.values()]
    rows = "\n".join(bad)
    # The first row of each key.
    only = "DELETE FROM bad WHERE rowid NOT IN (SELECT min(rowid) FROM bad GROUP BY key);"
    write_rows(agent.folder / "portward.db", rows, only, row(f"attachments/{FABRIKAM.segment}/192.0.2.7", good))
    until(lambda: agent.revision() == 2, "the revision is in force")
    assert agent.explain(FABRIKAM.segment, "192.0.2.7")["reason"] == "allowed-offer"
    assert verdicts(agent) == before
    printed = complaints(agent, "record refused")
    assert len(printed) >= 15
    assert all(unshown(line) is None for line in printed)
    # The numbers are refreshed each second.
    until(lambda: agent.metrics()["portward_records_refused_total"] == len(printed), "each of them is counted")


@pytest.mark.parametrize("stem", ["subscription-deep", "exemption-until-1969", "attachment-segment-long"])
def test_a_row_that_ended_the_daemon_does_so_no_more(agent: Agent, stem: str) -> None:
    before = verdicts(agent)
    write_rows(agent.folder / "portward.db", RECORDS[stem].path.read_text())
    until(lambda: agent.revision() == 2, "the revision is in force")
    assert [one_line(line).partition("in force: ")[2] for line in complaints(agent, "record refused")] == [
        RECORDS[stem].expected
    ]
    assert verdicts(agent) == before
    assert agent.process is not None
    assert agent.process.poll() is None
    agent.stop()
    agent.start()
    assert verdicts(agent) == before


def test_a_row_in_the_place_of_one_in_force_leaves_it_so(agent: Agent) -> None:
    before = verdicts(agent)
    subscription = next(record for record in records() if isinstance(record, Subscription))
    write_rows(agent.folder / "portward.db", row(key_of(subscription), '{"standing":"disabled"}'))
    until(lambda: agent.revision() == 2, "the revision is in force")
    assert len(complaints(agent, "record refused")) == 1
    assert verdicts(agent) == before
    agent.apply(*records())
    assert verdicts(agent) == before


@pytest.mark.parametrize(
    "stem",
    [
        "empty",
        "typo-key",
        "nul",
        "latin-1",
        "deep-lists",
        "backslashes",
        "escape-in-key",
        "workers-endless-digits",
    ],
)
def test_a_reload_of_a_bad_configuration_keeps_the_one_before(agent: Agent, stem: str) -> None:
    before = verdicts(agent)
    agent.config.write_bytes((HERE / "config" / f"{stem}.toml").read_bytes())
    agent.reload()
    (line,) = complaints(agent, "the configuration before stays in force: ")
    printed = one_line(line).partition("in force: ")[2]
    assert printed == CONFIGS[stem].expected.replace("FILE", str(agent.config))
    agent.configure()
    assert verdicts(agent) == before


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_reload_never_waits_for_what_is_no_file(agent: Agent, kind: str) -> None:
    agent.config.unlink()
    if kind == "pipe":
        os.mkfifo(agent.config)
    elif kind == "device":
        agent.config.symlink_to("/dev/zero")
    else:
        agent.config.mkdir()
    agent.reload()
    (line,) = complaints(agent, "the configuration before stays in force: ")
    assert one_line(line).endswith("Is a directory" if kind == "folder" else f"is a {kind}; expected a file")
    agent.config.rmdir() if kind == "folder" else agent.config.unlink()
    agent.configure()
    agent.reload()
    assert "read again and in force" in agent.log.read_text()
