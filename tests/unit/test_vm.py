"""What the tests in the virtual machine measure by."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from vm.guest import connect, watcher


def test_a_connection_that_is_not_open_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "RUN", tmp_path)
    lines = [{"at": 1.0}, {"at": 2.0}, {"at": 2.0, "wait": 0.5}, {"at": 3.0}, {"at": 9.0}]
    (tmp_path / "connect-vni1001").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert connect.read(2.0, 4.0) == [0.5, None]


@pytest.mark.parametrize(("written", "others", "taken"), [(1.0, 1.0, True), (-1.0, 1.0, False), (1.0, 0.0, False)])
def test_a_watcher_that_does_not_see_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: float, others: float, taken: bool
) -> None:
    """`written` seconds after the question, with `others` more packets than before."""
    monkeypatch.setattr(watcher, "RUN", tmp_path)
    now = time.monotonic()
    numbers = iter([{"at": now, "others": 5.0}] + 1000 * [{"at": now + written, "others": 5.0 + others}])
    monkeypatch.setattr(watcher, "read", lambda: next(numbers))
    if taken:
        assert watcher.newer(0.3)["others"] == 6.0
    else:
        with pytest.raises(TimeoutError):
            watcher.newer(0.3)
