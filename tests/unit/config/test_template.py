"""The configuration template in the package has every key, its default, and a comment on it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec

from portward.config.keys import Config, InterfaceGroup, Metrics, Queue, Verdicts
from portward.config.load import load_config
from portward.config.template import template

SHIPPED = Path(__file__).resolve().parents[3] / "systemd" / "portward.toml"


def test_the_shipped_file_is_what_the_program_makes_of_its_defaults() -> None:
    assert SHIPPED.read_text() == template(), (
        "make it anew: python -m portward.config.template > systemd/portward.toml"
    )


def test_it_is_taken_and_says_the_defaults() -> None:
    assert load_config(SHIPPED) == Config(segments=("vni*",), uplinks=("eth0",))


def test_the_group_that_is_shown_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(re.sub(r"(?m)^#(?! )", "", template()))
    assert load_config(path).groups == (InterfaceGroup(name="calico", interfaces=("cali*",)),)


def test_every_key_stands_there_with_a_line_above_it() -> None:
    # Groups are there as comments, because by default there are none.
    text = re.sub(r"(?m)^#(?! )", "", template())
    written = tomllib.loads(text)
    for struct, table in (
        (Config, written),
        (InterfaceGroup, written["groups"][0]),
        (Queue, written["queue"]),
        (Verdicts, written["verdicts"]),
        (Metrics, written["metrics"]),
    ):
        for field in msgspec.structs.fields(struct):
            assert field.encode_name in table
            assert re.search(rf"(?m)^# .+\n\[*{field.encode_name}\b", text), field.name
