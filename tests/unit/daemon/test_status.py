"""`portward status` says whether the agent is in step with the store, or what is not loaded yet."""

from __future__ import annotations

import pytest

from portward.cli import status, status_text
from portward.config.keys import Config
from portward.ops import host

CONFIG = Config(segments=("vni*",), uplinks=("up0",))
ANOTHER = "the store has another history, at revision 5 (a restored backup?)"


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize(
    ("behind", "told"),
    [
        (ANOTHER, f", NOT in step: {ANOTHER}, not loaded yet"),
        ("the store is at revision 7", ", NOT in step: the store is at revision 7, not loaded yet"),
    ],
)
def test_the_stores_own_revision_is_named_whatever_the_agent_has_seen(
    monkeypatch: pytest.MonkeyPatch, in_step: bool, behind: str, told: str
) -> None:
    """This includes a store that went back, whose newest revision is an old one."""
    monkeypatch.setattr(host, "behind_store", lambda _: behind)
    found = {"in_step": in_step, "store_error": "", "held": None}
    assert status_text.store(found | status._in_step(CONFIG, found)) == told


@pytest.mark.parametrize(
    ("in_step", "told"), [(True, ", in step"), (False, ", NOT in step: it has changes that are not loaded yet")]
)
def test_a_store_that_cannot_be_asked_is_what_the_agent_says(
    monkeypatch: pytest.MonkeyPatch, in_step: bool, told: str
) -> None:
    monkeypatch.setattr(host, "behind_store", lambda _: "")
    found = {"in_step": in_step, "store_error": "", "held": None}
    assert status_text.store(found | status._in_step(CONFIG, found)) == told


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            {"owned": True, "custodian": 7, "why": ""},
            "owned: no other program can remove them; process 7 keeps that",
        ),
        ({"owned": True, "custodian": None, "why": ""}, "while it runs; IT HAS NO CUSTODIAN now"),
        (
            {"owned": False, "custodian": None, "why": "Linux 6.9 and later do"},
            "not owned, another program can remove them: Linux 6.9 and later do",
        ),
    ],
)
def test_whether_another_program_can_remove_the_rules(found: dict[str, object], told: str) -> None:
    assert told in status_text._ownership(found)
