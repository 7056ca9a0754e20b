"""Mail software as tenants use it: how to set it up, send a mail with it, and read its result.

Timeouts are the software's defaults, because these are what a customer sees.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from mail.machines import Machine
from portward.lab.agent import until
from portward.lab.topology import MAIL4, MAIL6

SERVERS: Final = {4: MAIL4, 6: MAIL6}
# Longer than one attempt of any of them: the kernel gives a TCP connection up after about 130 s.
LONGEST_S: Final = 200.0


class Fate(StrEnum):
    """The result that the software reports for a mail."""

    DELIVERED = "delivered"
    TIMED_OUT = "timed out"
    REFUSED = "refused"
    CUT = "cut"


class Said(NamedTuple):
    """A mail's fate, the seconds until the software reported it, and the software's own message."""

    fate: Fate
    seconds: float
    words: str

    def __str__(self) -> str:
        words = f": `{self.words}`" if self.words else ""
        return f"{self.fate} after {self.seconds:.0f} s{words}"


class Client(Protocol):
    """Mail software on one machine."""

    # The name in the table, and the root that it is in.
    NAME: str
    ROOT: str

    def __init__(self, machine: Machine) -> None:
        """Sets it up."""

    def send(self, family: int, mails: Sequence[str]) -> list[Said]:
        """Sends mails (RFC 5322) over an address family; gives the result of one attempt for each."""


_WORDS: Final = (
    (re.compile(r"timed out|timeout", re.I), Fate.TIMED_OUT),
    (re.compile(r"Connection refused", re.I), Fate.REFUSED),
)


def classified(words: str, seconds: float) -> Said:
    """The fate that an error message stands for: a timeout or a refusal if it names one, else a cut connection."""
    for pattern, fate in _WORDS:
        if pattern.search(words):
            return Said(fate, seconds, words)
    return Said(Fate.CUT, seconds, words)


class _OneByOne:
    """Software that is started anew for each mail."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def send(self, family: int, mails: Sequence[str]) -> list[Said]:
        """Sends the mails one after the other."""
        found = []
        for mail in mails:
            began = time.monotonic()
            words = self.one(family, mail)
            seconds = time.monotonic() - began
            found.append(Said(Fate.DELIVERED, seconds, "") if words is None else classified(words, seconds))
        return found

    def one(self, family: int, mail: str) -> str | None:
        """Sends a mail; gives the error, or None."""
        raise NotImplementedError


class Smtplib(_OneByOne):
    """Python's own client."""

    NAME, ROOT = "Python smtplib", "postfix"
    _PROGRAM = """
import smtplib, sys
try:
    with smtplib.SMTP(sys.argv[1], 25, "tenant.example") as session:
        session.sendmail("sender@tenant.example", ["rcpt@mail.example"], sys.stdin.read())
except (OSError, smtplib.SMTPException) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

    def one(self, family: int, mail: str) -> str | None:
        done = self.machine.run("python3", "-c", self._PROGRAM, SERVERS[family], text=mail)
        return done.stderr.strip().splitlines()[-1] if done.returncode else None


class Swaks(_OneByOne):
    """The SMTP test client that support engineers use."""

    NAME, ROOT = "swaks", "postfix"

    def one(self, family: int, mail: str) -> str | None:
        done = self.machine.run(
            "swaks", "--server", SERVERS[family], *(["-6"] if family == 6 else []), "--ehlo", "tenant.example",
            "--from", "sender@tenant.example", "--to", "rcpt@mail.example", "--data", "-", text=mail,
        )  # fmt: skip
        if not done.returncode:
            return None
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("*** ")]
        return " ".join(" ".join(line.removeprefix("*** ") for line in said).split())


class Exim(_OneByOne):
    """Exim, with a smart host for each family."""

    NAME, ROOT = "Exim", "exim"
    _CONFIG = """\
primary_hostname = tenant.example
qualify_domain = tenant.example
log_file_path = /var/log/exim4/%slog
smtp_accept_max = 0
begin acl
begin routers
smart4:
  driver = manualroute
  domains = v4.example
  transport = smtp
  route_list = * MAIL4 byname
smart6:
  driver = manualroute
  domains = v6.example
  transport = smtp
  route_list = <; * "<+ MAIL6" byname
begin transports
smtp:
  driver = smtp
begin retry
* * F,2h,1m
"""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        machine.write("/etc/exim4/exim4.conf", self._CONFIG.replace("MAIL4", MAIL4).replace("MAIL6", MAIL6))
        machine.run("chown", "-R", "Debian-exim:", "/var/log/exim4", "/var/spool/exim4")

    def one(self, family: int, mail: str) -> str | None:
        to = f"rcpt@v{family}.example"
        log = self.machine.root / "var/log/exim4/mainlog"
        before = len(log.read_text(errors="replace")) if log.exists() else 0
        # Delete Exim's record of earlier attempts, because it delays the next attempt.
        self.machine.run("find", "/var/spool/exim4/db", "-name", "retry*", "-delete")
        # With -odf this process itself delivers the mail, and ends after one attempt.
        done = self.machine.run("exim4", "-odf", "-oi", "-f", "sender@tenant.example", to, text=mail)
        said = log.read_text(errors="replace")[before:] if log.exists() else done.stderr
        if f"=> {to}" in said:
            return None
        tried = [line for line in said.splitlines() if f"== {to}" in line]
        lines = tried or said.splitlines()[-1:] or [done.stderr.strip() or "it said nothing"]
        return re.sub(r"^.*?(?=defer|$)", "", lines[-1], count=1) or lines[-1]


class Postfix:
    """Postfix, with a smart host for each family and its queue."""

    NAME, ROOT = "Postfix", "postfix"
    _MAIN = f"""\
compatibility_level = 3.6
myhostname = tenant.example
mydestination =
inet_interfaces = loopback-only
inet_protocols = all
maillog_file = /var/log/postfix.log
alias_maps =
transport_maps = inline:{{
  {{v4.example = smtp:[{MAIL4}]}},
  {{v6.example = smtp:[ipv6:{MAIL6}]}}}}
default_transport = error:no such domain here
message_size_limit = 0
"""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        machine.write("/etc/postfix/main.cf", self._MAIN)
        machine.run("postconf", "-F", "*/*/chroot=n")
        done = machine.run("postfix", "start")
        if done.returncode:
            raise RuntimeError(f"postfix start: {done.stdout}{done.stderr}")

    def send(self, family: int, mails: Sequence[str]) -> list[Said]:
        """Queues all mails, and waits until Postfix has tried each of them once."""
        began = time.monotonic()
        to = f"rcpt@v{family}.example"
        for mail in mails:
            done = self._machine.run("sendmail", "-oi", "-f", "sender@tenant.example", to, text=mail)
            if done.returncode:
                raise RuntimeError(f"sendmail: {done.stderr}")
        until(
            lambda: all(self._queue(to).values()),
            f"postfix has tried to send to {to}",
            seconds=LONGEST_S,
            every_s=0.5,
        )
        seconds = time.monotonic() - began
        failed = self._queue(to)
        self._machine.run("postsuper", "-d", "-", text="".join(f"{id_}\n" for id_ in failed))
        delivered = [Said(Fate.DELIVERED, seconds, "")] * (len(mails) - len(failed))
        return [*delivered, *(classified(words, seconds) for words in failed.values())]

    def _queue(self, to: str) -> dict[str, str]:
        """The mails to this address that are still in the queue, by id, with the reason why. The reason is empty
        until Postfix has tried the mail."""
        entries = map(json.loads, self._machine.run("postqueue", "-j").stdout.splitlines())
        return {
            entry["queue_id"]: one.get("delay_reason", "") if entry["queue_name"] == "deferred" else ""
            for entry in entries
            for one in entry["recipients"]
            if one["address"] == to
        }


CLIENTS: Final[tuple[type[Client], ...]] = (Postfix, Exim, Swaks, Smtplib)
