"""A rejected source that tries to connect 20 times a second: how many of its connections are refused at once."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from bench.figures import Figure
from kernel.conftest import DENIED, running_gateway
from kernel.test_exact import connect
from portward.lab.topology import FABRIKAM

_PER_SECOND = 20
_SECONDS = 10
_SOON_S = 0.05
_FAMILIES = ((socket.AF_INET, "4", FABRIKAM.address4), (socket.AF_INET6, "6", FABRIKAM.address6))


def measure(folder: Path) -> list[Figure]:
    """`refused4_percent` and `refused6_percent`: connections by real sockets, refused within 50 ms."""
    found = []
    with running_gateway(folder, verdicts={"refuse_with": "reject"}) as gateway:
        for family, digit, address in _FAMILIES:
            gateway.source(FABRIKAM, address, DENIED)
            shares = []
            for _ in range(_SECONDS):
                soon = 0
                for _ in range(_PER_SECOND):
                    began = time.monotonic()
                    came, took = connect(gateway, FABRIKAM, family)
                    soon += came == "refused" and took <= _SOON_S
                    time.sleep(
                        max(0.0, 1 / _PER_SECOND - (time.monotonic() - began))
                    )  # pause: the pace of the connections
                shares.append(100 * soon / _PER_SECOND)
            share = sum(shares) / len(shares)
            what = f"% of {_PER_SECOND * _SECONDS} connections within 50 ms"
            found.append(Figure(f"refused{digit}_percent", share, min(shares), max(shares), what, ">= 99"))
    return found
