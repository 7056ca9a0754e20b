"""Words to the service manager arrive where there is one, and harm nobody where there is none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from portward.notify import notify


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
