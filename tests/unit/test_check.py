"""`portward check` finds what a start, or a request at three in the morning, would find."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from portward import check
from portward.errors import InputError
from portward.gateway import others, xtables

LEAST = 'segments = ["vni*"]\nuplinks = ["up0"]\n'


def test_a_file_where_the_tables_folder_should_be_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(f'{LEAST}table = "{path}"\n')
    with pytest.raises(InputError, match=r":3: table: '.*portward.toml' is no folder"):
        list(check.check(path))


@pytest.mark.parametrize(("with_store", "told"), [(True, True), (False, False)])
def test_a_program_that_cannot_be_run_is_told_and_keeps_no_agent_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_store: bool, told: bool
) -> None:
    class Kernel:
        """Takes everything, and nobody has its lock."""

        def owned_table(self, _: str) -> None:
            """None."""

        def __getattr__(self, _: str) -> Any:
            return lambda *_, **__: True

    monkeypatch.setattr(check, "Nft", Kernel)
    monkeypatch.setattr(check, "NfNetlink", Kernel)
    monkeypatch.setattr(xtables, "has_native_queue", lambda _: True)
    monkeypatch.setattr(others, "seen", lambda _: others.NOBODY)
    path = tmp_path / "portward.toml"
    path.write_text(f'{LEAST}[exemptions]\ncheck = ["{path}", "--quick"]\n')
    lines = list(itertools.islice(check.check(path, with_store=with_store), 6))
    assert any("portward.toml cannot be run here: each request for review waits" in line for line in lines) is told
