"""The Internet side: a mail server on ports 25 and 587, and a port 26 that only takes connections."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import threading
import time

from vm.guest.world import OTHER_PORT, RELAY_PORT, RUN, SMTP_PORT


def main() -> None:
    """Serves until it is ended by force."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    chooser = selectors.DefaultSelector()
    for port in (SMTP_PORT, OTHER_PORT, RELAY_PORT):
        listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        chooser.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in chooser.select():
            assert isinstance(key.fileobj, socket.socket)
            with contextlib.suppress(OSError):
                client = key.fileobj.accept()[0]
                threading.Thread(target=_guarded, args=(client,), daemon=True).start()


def _guarded(client: socket.socket) -> None:
    with client, contextlib.suppress(OSError):
        _session(client)


def _session(client: socket.socket) -> None:
    """One SMTP session with the commands that a mail needs (RFC 5321, 4.1.1). For each mail a line is added to
    /run/vm/mails: its length in bytes, and the longest pause between two of its lines in seconds."""
    client.sendall(b"220 mail.example\r\n")
    with client.makefile("rb") as lines:
        while line := lines.readline():
            verb = line[:4].upper().strip()
            if verb == b"DATA":
                client.sendall(b"354 go on\r\n")
                size, pause, last = 0, 0.0, time.monotonic()
                while (line := lines.readline()) and line != b".\r\n":
                    size += len(line)
                    pause, last = max(pause, time.monotonic() - last), time.monotonic()
                if not line:
                    return
                with (RUN / "mails").open("a") as out:
                    out.write(f"{size} {pause:.2f}\n")
            client.sendall(b"221 bye\r\n" if verb == b"QUIT" else b"250 mail.example\r\n")
            if verb == b"QUIT":
                return


if __name__ == "__main__":
    main()
