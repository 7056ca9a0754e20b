"""Mail of the lab asks no resolver. If none answers, each question would take 10 s or 20 s."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import pytest

from portward.lab.mail import Fate, OpenSession, Postbox, send
from portward.lab.topology import CONTOSO, Lab

ROOT = Path(__file__).resolve().parents[3]
# Each call of smtplib's client, also in programs that a test runs in another process.
_CALL = re.compile(r"smtplib\.SMTP\(([^()]|\([^()]*\))*\)")
# Host, port, and the name with which the client introduces itself.
_NAMED = re.compile(r"""smtplib\.SMTP\((?:[^,()]|\[[^]]*\])+,[^,()]+,\s*(?:HELO|"[\w.]+")[,)]""")


class Tenant:
    """A lab whose tenants are on this host."""

    def as_tenant(self, _: object) -> contextlib.AbstractContextManager[None]:
        """No namespace is entered."""
        return contextlib.nullcontext()


class Server:
    """Accepts one mail, and keeps all lines of the session in `said` and in the file of a postbox."""

    def __init__(self, postbox: Path) -> None:
        self._postbox, self.said = postbox, list[str]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        session, _ = self._socket.accept()
        with session, session.makefile("rw", newline="\r\n") as lines:
            _answer(lines, "220 mail.example")
            for line in lines:
                self.said.append(line.strip())
                if line.lower().startswith("data"):
                    _answer(lines, "354 go on")
                    self._text(lines)
                _answer(lines, "221 bye" if line.lower().startswith("quit") else "250 OK")

    def _text(self, lines: Any) -> None:
        text = "".join(iter(lines.readline, ".\r\n"))
        self._postbox.write_text(json.dumps({"content": text}) + "\n")

    def close(self) -> None:
        """Waits until the session has ended."""
        self._thread.join(60)
        self._socket.close()


def _answer(lines: Any, text: str) -> None:
    lines.write(f"{text}\n")
    lines.flush()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path / "postbox")
    yield found
    found.close()


@pytest.fixture(autouse=True)
def no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question for a name fails the test."""
    real = socket.getaddrinfo

    def numbers_only(host: Any, *more: Any, **named: Any) -> Any:
        ip_address(host)
        return real(host, *more, **named)

    def asked(*_: object) -> str:
        raise AssertionError("the resolver is asked")

    monkeypatch.setattr(socket, "getaddrinfo", numbers_only)
    for name in ("getfqdn", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "getnameinfo"):
        monkeypatch.setattr(socket, name, asked)


def test_a_mail_of_the_lab_asks_no_resolver(server: Server, tmp_path: Path) -> None:
    postbox = Postbox(tmp_path / "postbox")
    sent = send(cast("Lab", Tenant()), CONTOSO, "127.0.0.1", server.port, postbox, timeout=60)
    assert sent.fate is Fate.DELIVERED
    assert server.said[0] == "ehlo tenant.example"


def test_a_session_of_the_lab_asks_no_resolver(server: Server, tmp_path: Path) -> None:
    session = OpenSession(cast("Lab", Tenant()), CONTOSO, "127.0.0.1", server.port, timeout=60)
    session.go_on()
    assert session.finish(Postbox(tmp_path / "postbox")).fate is Fate.DELIVERED
    assert server.said[0] == "ehlo tenant.example"


def test_every_mail_of_a_test_has_a_name_too() -> None:
    calls = {
        f"{path.relative_to(ROOT)}: {found[0]}"
        for folder in ("agent", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for found in _CALL.finditer(path.read_text())
        if path != Path(__file__)
    }
    assert len(calls) >= 4
    assert not {call for call in calls if not _NAMED.search(call)}
