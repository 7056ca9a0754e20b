"""An allowed tenant's long mail: an SMTP session on port 25 that goes on until the file `ENOUGH` exists.

    python3 -m vm.guest.transfer SEGMENT

`vm.guest.server` records how many bytes arrived, and the longest pause between two lines.
"""

from __future__ import annotations

import smtplib
import sys
import time

from vm.guest.world import MAIL4, RUN, SEGMENTS, SMTP_PORT

ENOUGH = RUN / "enough"


def main() -> None:
    """Sends the mail; prints the server's last reply code and the bytes that were sent."""
    source = (SEGMENTS[sys.argv[1]][3], 0)
    session = smtplib.SMTP(MAIL4, SMTP_PORT, "tenant.example", timeout=60, source_address=source)
    session.ehlo()
    session.mail("sender@tenant.example")
    session.rcpt("rcpt@mail.example")
    session.docmd("DATA")
    size = 0
    while not ENOUGH.exists():
        line = f"line {time.monotonic()}\r\n".encode()
        session.send(line)
        size += len(line)
        time.sleep(0.1)  # pause: the pace of the sender
    session.send(b".\r\n")
    print(session.getreply()[0], size, flush=True)


if __name__ == "__main__":
    main()
