"""Runs pytest in the machine, on the checkout that the second disk carries, and reports each test as a row.

`words.json` on that disk has pytest's arguments. The reports also come from here: pytest loads this file as a
plugin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vm.guest.keys import hold_hooks
from vm.guest.machine import booted, sh
from vm.guest.reporting import report

_PAYLOAD = Path("/run/payload")
_TREE = Path("/root/tree")
# Modules that the tests' programs load by themselves on a host where root may. Here it saves the wait.
_MODULES = "nft_queue nfnetlink_queue br_netfilter 8021q vxlan veth tun bridge sch_ingress nf_conntrack_netlink"
_NOTE_CHARACTERS = 3_000


def main() -> None:
    """Runs the tests, then switches the machine off."""
    report(stage=f"{booted()}: kernel {os.uname().release}", leaks=True)
    hold_hooks()
    for module in _MODULES.split():
        sh(f"modprobe {module}", check=False)
    # br_netfilter is a matter of each namespace. Elsewhere it is off.
    sh("sysctl -q net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0", check=False)
    sh(f"mkdir -p {_TREE} && cp -a {_PAYLOAD}/tree/. {_TREE}/", check=False)
    words = json.loads((_PAYLOAD / "words.json").read_text())
    paths = [str(_TREE / "agent"), str(_TREE / "tests"), str(_PAYLOAD / "libraries"), str(_PAYLOAD)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "vm.guest.suite", "-p", "no:cacheprovider", "-p", "no:randomly",
         "-o", "timeout=1200", "-q", "--tb=short", *words],
        cwd=_TREE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ":".join(paths), "PATH": _path(), "HOME": "/root", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    report(note=done.stdout[-_NOTE_CHARACTERS:])
    report(what="pytest's own exit code", happened=str(done.returncode), good=done.returncode == 0)
    report(end=True)
    sh("systemctl poweroff --force --force", check=False)
    time.sleep(60)  # pause: the machine ends meanwhile


def _path() -> str:
    return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def pytest_runtest_logreport(report: Any) -> None:
    """Reports each test to the host: its result, and why it failed."""
    if report.when == "call" or report.outcome != "passed":
        tell(report)


def tell(found: Any) -> None:
    """Reports one of pytest's results. A test that is skipped is a note."""
    if found.outcome == "skipped":
        report(note=f"skipped {found.nodeid}: {str(found.longrepr)[-150:]}")
        return
    good = found.outcome == "passed"
    report(what=found.nodeid, happened=f"{found.when}, {found.duration:.1f} s", good=good)
    if not good:
        report(note=str(found.longreprtext)[-_NOTE_CHARACTERS:])


if __name__ == "__main__":
    main()
