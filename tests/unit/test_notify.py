"""Words to the service manager arrive where there is one, and harm nobody where there is none."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import pytest

from portward.notify import log_formatter, notify


def test_words_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(path))
        notify("READY=1", "STATUS=2 segments")
        assert manager.recv(100) == b"READY=1\nSTATUS=2 segments"


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
        record = logging.LogRecord("portward", level, "", 0, "one\ntwo", None, None)
        assert log_formatter().format(record) == f"<{priority}>one\n<{priority}>two"
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        assert log_formatter().format(record).endswith(" one\ntwo"), "somebody else reads it"
