"""Verbs print readable text on terminals of every encoding, and end well on streams that take no output."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from portward.base.characters import unshown
from portward.cli import main, streams
from portward.errors import PortwardError
from portward.store.codec import encode
from unit.store.samples import CONTOSO, EXAMPLE, FABRIKAM

TEXT = "“é→\u202f☃” \U0001f4bb"


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], io.BytesIO]:
    """Sets standard output to an encoding, prepared as by the program. Returns the buffer with its bytes."""

    def make(encoding: str) -> io.BytesIO:
        data = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding=encoding, errors="strict"))
        streams.prepare()
        return data

    return make


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("latin-1", b'"\xe9-> \\u2603" \\ud83d\\udcbb\n'),
        ("ascii", b'"\\u00e9-> \\u2603" \\ud83d\\udcbb\n'),
        ("utf-8", f"{TEXT}\n".encode()),
    ],
)
def test_a_line_can_be_printed_everywhere(
    stream: Callable[[str], io.BytesIO], encoding: str, expected: bytes
) -> None:
    data = stream(encoding)
    streams.echo(TEXT)
    assert data.getvalue() == expected


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252", "koi8-r", "shift_jis"])
def test_json_is_json_everywhere(stream: Callable[[str], io.BytesIO], encoding: str) -> None:
    data = stream(encoding)
    streams.echo_json({"name": TEXT + "\u202e\x9b\n"})
    assert json.loads(data.getvalue().decode("utf-8")) == {"name": TEXT + "\u202e\x9b\n"}
    assert data.getvalue().count(b"\n") == 1
    assert b"\xe2\x80\xae" not in data.getvalue(), "a terminal would turn the line"


def test_a_name_of_bytes_is_json_too(stream: Callable[[str], io.BytesIO]) -> None:
    data = stream("utf-8")
    streams.echo_json({"segment": "vni\udcff"})
    assert json.loads(data.getvalue()) == {"segment": "vni\udcff"}


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_document_is_utf_8_everywhere(stream: Callable[[str], io.BytesIO], encoding: str) -> None:
    data = stream(encoding)
    streams.put(f"name: {TEXT}\n")
    streams.flush()
    assert data.getvalue().decode() == f"name: {TEXT}\n"


def test_what_others_wrote_makes_no_line(stream: Callable[[str], io.BytesIO]) -> None:
    data = stream("utf-8")
    streams.echo("by eve\nby alice\r\x1b[2K")
    assert data.getvalue() == rb"by eve\nby alice\r\x1b[2K" + b"\n"


def folder(tmp_path: Path) -> Path:
    """A configuration without a store yet, and an inventory."""
    config = tmp_path / "portward.toml"
    config.write_text(
        f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{tmp_path / "portward.db"}"\n'
        f'table = "{tmp_path / "table"}"\n'
    )
    (tmp_path / "inventory.yaml").write_text(EXAMPLE.replace("fabrikam", "fabri→kam"), encoding="utf-8")
    return config


def portward(*arguments: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the program."""
    argv = [sys.executable, "-m", "portward", *arguments]
    return subprocess.run(argv, timeout=60, check=False, stderr=subprocess.PIPE, **more)


def revision(tmp_path: Path) -> int:
    """The newest revision in the store."""
    with sqlite3.connect(tmp_path / "portward.db") as store:
        return int(store.execute("SELECT coalesce(max(number), 0) FROM revision").fetchone()[0])


def test_a_verb_that_has_written_says_so_whatever_its_output_takes(tmp_path: Path) -> None:
    config = str(folder(tmp_path))
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    inventory = str(tmp_path / "inventory.yaml")
    applied = portward("apply", inventory, "--config", config, stdout=subprocess.PIPE, env=latin)
    assert (applied.returncode, applied.stderr) == (0, b"")
    revoke = ("exemption", "revoke", str(FABRIKAM.id), "--reason", "spam →", "--config", config)
    with Path("/dev/full").open("w") as full:
        result = portward(*revoke, stdout=full)
    assert result.returncode == 1
    assert result.stderr.decode() == (
        "portward: standard output: No space left on device; the store was changed, as revision 2\n"
    )
    ask = ("exemption", "request", str(FABRIKAM.id), "--justification", "x", "--config", config)
    read, write = os.pipe()
    os.close(read)
    result = portward(*ask, stdout=write)
    os.close(write)
    assert (result.stderr, revision(tmp_path)) == (b"", 3)
    assert result.returncode == 0, "it is done, though no process reads that"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_verb_and_are_given_to_no_file(tmp_path: Path, closed: str) -> None:
    config = folder(tmp_path)
    command = f"{sys.executable} -m portward apply {tmp_path}/inventory.yaml --config {config} {closed}"
    assert subprocess.run(["sh", "-c", command], timeout=60, check=False, capture_output=True).returncode == 0
    assert revision(tmp_path) == 1
    assert (tmp_path / "portward.db").read_bytes().startswith(b"SQLite format 3")


def test_standard_input_that_is_closed_is_named(tmp_path: Path) -> None:
    command = f"{sys.executable} -m portward apply - --config {folder(tmp_path)} <&-"
    result = subprocess.run(["sh", "-c", command], timeout=60, check=False, capture_output=True)
    assert (result.returncode, result.stderr) == (2, b"portward: standard input: is closed\n")


def test_a_failure_after_writing_says_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise PortwardError("the table cannot be read")

    config = folder(tmp_path)
    monkeypatch.setattr("portward.cli.inventory.behind_held", fails)
    inventory = str(tmp_path / "inventory.yaml")
    monkeypatch.setattr(sys, "argv", ["portward", "apply", inventory, "--config", str(config)])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err == (
        "portward: the table cannot be read; the store was changed, as revision 1\n"
    )


REJECT = ("exemption", "reject", str(CONTOSO.id))
FOREIGN = [
    ((*REJECT, "--reason", b"M\xfcr"), r"--reason: 'M\xfcr': byte 0xfc is not UTF-8"),
    (("exemption", "list", "--name", b"\xff"), r"--name: '\xff': byte 0xff is not UTF-8"),
    (("exemption", "show", b"\xff"), r"SUBSCRIPTION: '\xff': byte 0xff is not UTF-8"),
    (("diagnose", b"M\xfcr"), r"SUBSCRIPTION: 'M\xfcr': byte 0xfc is not UTF-8"),
    (("explain", b"\xff", "10.0.0.4"), "is not a segment of"),
    (("explain", "vni1", b"10.0.0.\xff"), r"ADDRESS: '10.0.0.\xff': byte 0xff is not UTF-8"),
    (("apply", b"no-such-\xff.yaml"), r"no-such-\xff.yaml: No such file"),
    (("audit", "--actor", b"\xff"), r"--actor: '\xff': byte 0xff is not UTF-8"),
    (("policy", "show", b"no-such-\xff.toml"), r"no-such-\xff.toml: No such file"),
    (("apply", "x.yaml", "--as", b"\xff"), r"--as: '\xff': byte 0xff is not UTF-8"),
    ((b"\xff",), "no such command"),
]  # fmt: skip


def test_an_interrupt_after_writing_says_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    config = folder(tmp_path)
    monkeypatch.setattr("portward.cli.inventory.behind_held", interrupted)
    inventory = str(tmp_path / "inventory.yaml")
    monkeypatch.setattr(sys, "argv", ["portward", "apply", inventory, "--config", str(config)])
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "portward: interrupted; the store was changed, as revision 1\n"


@pytest.mark.parametrize(("arguments", "message"), FOREIGN, ids=[message for _, message in FOREIGN])
def test_bytes_that_are_not_utf_8_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str | bytes, ...],
    message: str,
) -> None:
    words = [os.fsdecode(word) for word in arguments]
    more = [] if arguments[0] in (b"\xff", "policy") else ["--config", str(folder(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["portward", *words, *more])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


def test_arguments_of_utf_8_are_read_under_every_locale(tmp_path: Path) -> None:
    config = str(folder(tmp_path))
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    apply = ("apply", str(tmp_path / "inventory.yaml"), "--config", config, "--as", "Jürgen")
    applied = portward(*apply, stdout=subprocess.PIPE, env=plain)
    assert (applied.returncode, applied.stderr) == (0, b"")
    found = portward("diagnose", "fabri→kam", "--config", config, stdout=subprocess.PIPE, env=plain)
    assert found.returncode == 0, found.stderr
    assert b"fabri->kam" in found.stdout
    assert "Jürgen" in portward("audit", "--config", config, stdout=subprocess.PIPE).stdout.decode()


def test_a_row_of_another_tool_forges_no_line_of_a_history(tmp_path: Path) -> None:
    config = str(folder(tmp_path))
    portward("apply", str(tmp_path / "inventory.yaml"), "--config", config, stdout=subprocess.DEVNULL)
    actor = "eve\n2027-01-01 00:00:00Z  revision 9  alice\x1b[1A\u202e"
    with sqlite3.connect(tmp_path / "portward.db") as store:
        store.execute("DROP TRIGGER revision_stays")
        store.execute("UPDATE revision SET actor = ?", (actor,))
    store.close()
    result = portward("exemption", "history", str(FABRIKAM.id), "--config", config, stdout=subprocess.PIPE)
    lines = result.stdout.decode().splitlines()
    assert r"eve\n2027-01-01 00:00:00Z  revision 9  alice\x1b[1A\u202e: " in lines[0]
    assert not any(line.startswith("2027") for line in lines)


FORGED = "fabri\nkam\n\nDear customer,\x1b[2J\u202e you may send"


def test_a_row_of_another_tool_forges_nothing_in_a_diagnosis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answer and letter have as many lines as for a name without a line break."""
    config = folder(tmp_path)

    def lines(name: str, *more: str) -> list[str]:
        record = encode(replace(FABRIKAM, name=name))
        with sqlite3.connect(tmp_path / "portward.db") as store:
            store.execute("UPDATE record SET body = ? WHERE key = ?", (record, f"subscriptions/{FABRIKAM.id}"))
        store.close()
        words = ["portward", *more, "--config", str(config)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match="0"):
            main()
        return capsys.readouterr().out.split("\n")

    portward("apply", str(tmp_path / "inventory.yaml"), "--config", str(config), stdout=subprocess.DEVNULL)
    diagnose = ("diagnose", str(FABRIKAM.id), "--lang", "en")
    for more in (diagnose, (*diagnose, "--customer"), ("explain", "vni1002", "10.0.0.4"), ("exemption", "list")):
        plain, forged = lines("fabrikam", *more), lines(FORGED, *more)
        assert len(plain) == len(forged), more
        assert all(unshown(line) is None for line in forged), more
        assert not any(line.startswith("Dear customer") for line in forged)


def test_a_file_in_place_of_standard_output_can_be_read(stream: Callable[[str], io.BytesIO]) -> None:
    """This includes what other programs have written to it."""
    data = stream("utf-8")
    data.write(b"\xff\x80.\n")
    data.seek(0)
    assert sys.stdout.read() == "��.\n"
