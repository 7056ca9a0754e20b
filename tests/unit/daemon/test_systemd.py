"""Notifications arrive at the service manager. If there is none, they do no harm."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import pytest

from portward.daemon.systemd import log_formatter, notify, watchdog_seconds
from unit.scarce import no_descriptors


def test_words_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(path))
        notify("READY=1", "STATUS=2 segments")
        assert manager.recv(100) == b"READY=1\nSTATUS=2 segments"


def test_words_arrive_though_no_descriptor_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the watchdog would end an agent that enforces."""
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(path))
        notify("READY=1")
        with no_descriptors():
            notify("WATCHDOG=1")
        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"WATCHDOG=1"


def test_a_manager_that_is_gone_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(path))
    notify("WATCHDOG=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(path))
    notify("WATCHDOG=1")


def test_a_manager_that_does_not_read_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(path))
        for _ in range(2_000):
            notify("WATCHDOG=1")


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7)],
)
def test_the_journal_is_told_each_lines_priority(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: int, priority: int
) -> None:
    with (tmp_path / "log").open("w") as out:
        status = os.fstat(out.fileno())
        monkeypatch.setattr(sys, "stderr", out)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        record = logging.LogRecord("portward", level, "", 0, "one\n<0>\x1b[2Jtwo", None, None)
        assert log_formatter().format(record) == rf"<{priority}>one\n<0>\x1b[2Jtwo", "others forge no line"
        record.exc_text = "Traceback\n  \x9bthree"
        assert log_formatter().format(record).splitlines()[1:] == [
            f"<{priority}>Traceback",
            rf"<{priority}>  \x9bthree",
        ]
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        assert log_formatter().format(record).splitlines()[0].endswith(r" one\n<0>\x1b[2Jtwo"), (
            "somebody else reads it"
        )


@pytest.mark.parametrize("text", ["", "abc", "-5", "0", "\udcff", "٣٠", "9" * 5_000, " 1000000", "1e6"])
def test_a_watchdog_of_no_number_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", text)
    assert watchdog_seconds() is None


@pytest.mark.parametrize("address", ["\udcff", "@\udcff\udcfe", "x" * 5_000, "@", "\n/no/such", "@" + "y" * 500])
def test_a_manager_that_cannot_be_ends_nobody(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1", "STATUS=\udcff")
