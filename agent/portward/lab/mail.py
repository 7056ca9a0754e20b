"""Real mail for the lab: SMTP servers on the Internet side, and tenants that send to them.

The server runs in the namespace of the Internet side: `python -m portward.lab.mail FILE`. It listens on ports 25
and 587, IPv4 and IPv6, prints `ready`, and writes each message that it accepts to FILE, as a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import smtplib
import socket
import sys
import time
import uuid
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from portward.lab.topology import Lab, Tenant

PORTS: Final = (25, 587)
READY: Final = "ready"
# The name with which a tenant introduces itself. Without one, smtplib asks the resolver for this host's name. That
# takes 20 s for each mail if the name is not in /etc/hosts and no server answers.
HELO: Final = "tenant.example"


class Fate(StrEnum):
    """The fate of a mail."""

    DELIVERED = "delivered"
    TIMED_OUT = "timed out"
    REFUSED = "refused"
    CUT = "cut"  # the session ended before the mail was delivered


class Outcome(NamedTuple):
    """A fate, and the seconds until it was known."""

    fate: Fate
    seconds: float

    def __str__(self) -> str:
        return f"{self.fate} after {self.seconds:.1f} s"


class Postbox:
    """The messages that the server has accepted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def messages(self) -> list[dict[str, Any]]:
        """All messages, oldest first."""
        return (
            [json.loads(line) for line in self.path.read_text("utf-8").splitlines()] if self.path.exists() else []
        )

    def holds(self, id_: str) -> bool:
        """Whether the message with this id arrived."""
        return any(id_ in message["content"] for message in self.messages())


def send(lab: Lab, tenant: Tenant, server: str, port: int, postbox: Postbox, *, timeout: float = 3.0) -> Outcome:
    """Sends a mail from a tenant's machine by SMTP. It counts as delivered only if it is in the postbox. `timeout`
    is in seconds, for each step of the session."""
    id_, began = uuid.uuid4().hex, time.monotonic()
    try:
        with lab.as_tenant(tenant), smtplib.SMTP(server, port, HELO, timeout=timeout) as session:
            session.sendmail("sender@tenant.example", ["rcpt@mail.example"], f"Subject: {id_}\r\n\r\nHello.\r\n")
    except ConnectionRefusedError:
        return Outcome(Fate.REFUSED, time.monotonic() - began)
    except TimeoutError:
        return Outcome(Fate.TIMED_OUT, time.monotonic() - began)
    except (OSError, smtplib.SMTPException):
        return Outcome(Fate.CUT, time.monotonic() - began)
    if not postbox.holds(id_):
        raise RuntimeError(f"the server said yes to {id_} and has no record of it")
    return Outcome(Fate.DELIVERED, time.monotonic() - began)


class OpenSession:
    """An SMTP session that stays open in the middle of a mail."""

    def __init__(self, lab: Lab, tenant: Tenant, server: str, port: int, *, timeout: float = 3.0) -> None:
        """Connects, and sends all commands before the text of the mail; raises OSError."""
        with lab.as_tenant(tenant):
            self._session = smtplib.SMTP(server, port, HELO, timeout=timeout)
        self._session.ehlo()
        self._session.mail("sender@tenant.example")
        self._session.rcpt("rcpt@mail.example")
        self._session.docmd("DATA")
        self._id = uuid.uuid4().hex

    def go_on(self) -> None:
        """Sends a line of the mail's text; raises OSError if the session was reset."""
        self._session.send(f"line {time.monotonic()}\r\n")

    def close(self) -> None:
        """Closes the connection in the middle of the mail."""
        self._session.close()

    def finish(self, postbox: Postbox) -> Outcome:
        """Ends the mail, and returns what happened to it."""
        began = time.monotonic()
        try:
            self._session.send(f"id {self._id}\r\n.\r\n")
            self._session.getreply()
            fate = Fate.DELIVERED if postbox.holds(self._id) else Fate.CUT
        except (OSError, smtplib.SMTPException) as error:
            # smtplib reports a timeout as a disconnection, with the TimeoutError as its context.
            silent = isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError)
            fate = Fate.TIMED_OUT if silent else Fate.CUT
        self._session.close()
        return Outcome(fate, time.monotonic() - began)


async def serve(path: Path) -> None:
    """Accepts mail on all of `PORTS` until the process is killed."""
    from aiosmtpd.smtp import SMTP, Envelope, Session  # noqa: PLC0415 # only the server's side needs it

    class Recorder:
        """Appends each accepted message, with its port, to the file."""

        def __init__(self, port: int) -> None:
            self._port = port

        async def handle_DATA(self, _: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 # aiosmtpd's
            with path.open("a", encoding="utf-8") as out:
                content = (envelope.original_content or b"").decode(errors="replace")
                out.write(
                    json.dumps({"peer": (session.peer or "?")[0], "port": self._port, "content": content}) + "\n"
                )
            return "250 OK"

    loop = asyncio.get_running_loop()
    for port in PORTS:
        for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 # its namespace
            await loop.create_server(
                lambda port=port: SMTP(Recorder(port), hostname="mail.example", loop=loop),
                host, port, family=family,
            )  # fmt: skip
    print(READY, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
