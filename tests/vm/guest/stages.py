"""The stages of the test, boot after boot. A file on the machine's disk holds the number of the boot.

Four blocked tenants send to port 25 from the first second of each boot. Their packets may come out only before
portward is installed and after it is purged. There they must, because that shows that the way to the uplink is
open and that the watcher sees packets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from vm.guest import connect, devices, instances, watcher
from vm.guest.keys import hold_hooks
from vm.guest.machine import CONFIG, booted, configure, row, sh, slower, until
from vm.guest.reporting import report
from vm.guest.transfer import ENOUGH
from vm.guest.world import ALLOWED, RUN, SEGMENTS

_STATE = Path("/var/lib/vm-stage")
_STORE = Path("/var/lib/portward/portward.db")
_WORST = 2.0  # seconds that a new connection may wait while the package is upgraded
_LEVEL = 1.6  # of systemd-analyze security
# The contents of the agent's own root folder: the folders of debian/portward.dirs, and the links of a merged /usr.
_SEEN = "bin dev etc home lib lib64 proc root run sbin sys tmp usr var"
# portward's tables while it enforces, and while port 25 is closed.
_ENFORCES = ["bridge portward", "inet portward"]
_CLOSED = ["bridge portward_closed", "inet portward_closed"]
_CAPABILITIES = (1 << 12) | (1 << 13)  # CAP_NET_ADMIN, CAP_NET_RAW


def main() -> None:
    """Runs the stages of this boot, then reboots; after the last boot it switches the machine off."""
    number = int(_STATE.read_text()) if _STATE.exists() else 0
    _STATE.write_text(str(number + 1))
    try:
        hold_hooks()
        BOOTS[number]()
    except Exception:
        row("no surprise", "an exception", good=False)
        report(note=traceback.format_exc())
        sh("journalctl -b --no-pager | tail -n 30 > /dev/ttyS0", check=False)
        _off()


# --- without portward ---


def _bare() -> None:
    report(stage=f"boot 1, {booted()}: a stock Debian, without portward", leaks=True)
    until(lambda: watcher.read()["leaked"] > 20, "packets of the blocked tenants", seconds=20)
    row("without portward the blocked tenants' packets to port 25 come out", "they do", good=True)
    until(lambda: watcher.read()["bridged"] > 20, "packets of the bridged tenant", seconds=20)
    row("… also those that a bridge forwards", "they do", good=True)
    report(stage="installation of the package")
    report(note=sh("dpkg -i /run/payload/old.deb"))
    tables = sh("nft list tables")
    row("an installation alone enforces nothing", tables or "no table", good="portward" not in tables)
    enabled = sh("systemctl is-enabled portward-baseline portward").split()
    row("both units start at the next boot", enabled, good=enabled == ["enabled", "enabled"])
    configure()
    report(note=sh("portward apply /run/vm/inventory.json"))
    _reboot()


# --- from power-on ---


def _first() -> None:
    report(stage=f"boot 2, {booted()}: from power-on", leaks=False)
    _wait_active()
    _nothing_came_out("from power-on until the agent enforces")
    for name in ("portward-baseline", "systemd-networkd", "portward"):
        since = sh(f"systemctl show -P ActiveEnterTimestampMonotonic {name}")
        report(note=f"{name} was up {int(since) / 1e6:.1f} s after power-on")
    status = json.loads(sh("portward status --json"))
    row("verdicts in bridges, too", status["bridged"], good=status["bridged"])
    row("queue by nft's own statement", status["queue_path"], good="nft" in status["queue_path"])
    for segment in ALLOWED:
        row(f"the allowed tenant of {segment} connects", _connects(segment), good=_connects(segment) is not None)
    _hardening()
    _journal()
    _reload()
    _devices()
    _beside_nftables()
    _translated()
    instances.begin()
    _breaks()
    _nothing_came_out("in this boot")
    report(stage="the store becomes unreachable, and the machine boots again")
    _STORE.rename("/var/lib/elsewhere")
    _reboot()


def _hardening() -> None:
    report(stage="hardening")
    pid = sh("systemctl show -P MainPID portward")
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"(?m)^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):\s+(\S+)", status))
    rootless = found["Uid"] != "0" and int(found["CapEff"], 16) == int(found["CapBnd"], 16) == _CAPABILITIES
    row("the daemon runs without root, with CAP_NET_ADMIN and CAP_NET_RAW alone", found, good=rootless)
    row("… and in a filter of system calls", found["Seccomp"], good=found["Seccomp"] == "2")
    queue = _metric("portward_queue_waiting_packets{")
    row("it reads its queue's counters", queue, good=queue is not None)
    said = sh("systemd-analyze security portward.service --no-pager", check=False)
    level = float(re.findall(r"Overall exposure level for \S+: ([\d.]+)", said)[0])
    row(f"systemd-analyze security: at most {_LEVEL}", level, good=level <= _LEVEL)
    root = Path(f"/proc/{pid}/root")
    seen = " ".join(sorted(path.name for path in root.iterdir()))
    state = [path.name for path in (root / "var/lib").iterdir()]
    good = seen == _SEEN and state == ["portward"]
    row("of the machine's files it sees its own root folder", f"{seen}; in var/lib: {state}", good=good)
    # The machine has no `man`. Complaints about the test's own units do not count.
    said = sh("systemd-analyze verify --man=no portward.service portward-baseline.service", check=False)
    complaints = [line for line in said.splitlines() if "/vm-" not in line]
    row("systemd-analyze verify", complaints or "clean", good=not complaints)


def _journal() -> None:
    lines = [json.loads(line) for line in sh("journalctl -b -u portward -o json --no-pager").splitlines()]
    own = [
        line for line in lines if line.get("SYSLOG_IDENTIFIER") == "portward" and "enforcing" in line["MESSAGE"]
    ]
    fields = {name: own[-1].get(name) for name in ("PRIORITY", "_SYSTEMD_UNIT", "_UID", "MESSAGE")}
    good = fields["PRIORITY"] == "6" and fields["_SYSTEMD_UNIT"] == "portward.service"
    row("fields in the journal", fields, good=good and not fields["MESSAGE"].startswith("INFO"))


def _reload() -> None:
    """Ten reloads, each of which replaces the whole ruleset, while a blocked tenant sends as fast as it can. Then
    a valid change and an invalid one."""
    report(stage="systemctl reload")
    before = sh("systemctl show -P MainPID portward")
    flood = _daemon("blue", "sender", "vni1002", "0")
    for seconds in range(10, 20):
        configure(f"[verdicts]\ndeny_seconds = {seconds}")
        sh("systemctl reload portward")
        _forgets_after(seconds)
    flood.kill()
    _nothing_came_out("ten reloads later")
    configure("[verdicts]\ndeny_seconds = 45")
    sh("systemctl reload portward")
    took = _forgets_after(45)
    row("a change is in force, in the same process", f"{took:.1f} s", good=_pid() == before)
    CONFIG.write_text('segments = ["vni*"]\nuplinks = 3\n')
    sh("systemctl reload portward")
    until(lambda: "stays in force" in _journal_of(3), "the refusal as an error in the journal")
    row("a bad one is refused, logged as an error", _journal_of(3).splitlines()[-1][:150], good=_pid() == before)
    configure()
    sh("systemctl reload portward")


def _devices() -> None:
    report(stage="tunnels that end here, and devices on top of segments")
    devices.tunnels()
    devices.stacked()
    _nothing_came_out("while devices came and went")


def _beside_nftables() -> None:
    """Debian's nftables.service, whose file begins with `flush ruleset`, starts and stops while a blocked tenant
    sends without a pause."""
    report(stage="nftables.service")
    floods = [_daemon("blue", "sender", "vni1002", "0"), _daemon("mint", "sender", "tap2", "0.02")]
    for word in ("start", "reload", "restart", "stop"):
        sh(f"systemctl {word} nftables")
        until(lambda: _ours() == _ENFORCES, "the agent's ruleset", seconds=60)
    row("the agent has its ruleset back after each of start, reload, restart and stop", "", good=True)
    sh("systemctl stop portward")
    for word in ("start", "reload", "restart"):
        sh(f"systemctl {word} nftables")
        until(_baseline_is_done, "the baseline's ruleset", seconds=60)
    row("the baseline too, where no agent runs", "", good=True)
    sh("systemctl stop nftables")
    row("… and a stop leaves port 25 closed", _ours(), good=_ours() == _CLOSED)
    sh("systemctl start portward")
    _wait_active()
    row("… until the agent starts", _ours(), good=_ours() == _ENFORCES)
    for flood in floods:
        flood.kill()
    _nothing_came_out("while nftables.service came and went")
    sh("systemctl enable --now nftables")  # so each later shutdown flushes the rules
    until(lambda: _ours() == _ENFORCES, "the agent's ruleset", seconds=60)


def _translated() -> None:
    """Another program translates addresses, so the forward guard classifies each packet a second time when it is
    forwarded, also in a VRF."""
    report(stage="translation by others")
    sh("nft 'add table ip vm; add chain ip vm c { type nat hook prerouting priority -100; }'")
    took = until(lambda: _metric("portward_guard_loaded") == "portward_guard_loaded 1.0", "the forward guard")
    row("the forward guard is loaded", f"{took:.1f} s", good=True)
    for segment in ALLOWED:
        row(f"the allowed tenant of {segment} connects", _connects(segment), good=_connects(segment) is not None)
    _nothing_came_out("while the guard is loaded")
    sh("nft delete table ip vm")
    until(lambda: _metric("portward_guard_loaded") == "portward_guard_loaded 0.0", "the guard is gone")


def _baseline_is_done() -> bool:
    # systemd does not pass a reload on to a unit that is still starting, and then the port would stay closed. So
    # wait until the unit is active, too.
    return _ours() == _ENFORCES and sh("systemctl is-active portward-baseline", check=False) == "active"


def _ours() -> list[str]:
    """portward's tables in the kernel, without the one that is only the lock of a running agent and has no
    rules."""
    tables = [line.removeprefix("table ") for line in sh("nft list tables").splitlines()]
    return sorted(name for name in tables if "portward" in name and not name.endswith("portward_lock"))


def _forgets_after(seconds: int) -> float:
    """Waits until the kernel caches a denial for `seconds`; gives the seconds of waiting."""
    wanted = f"timeout {seconds}s"
    return until(lambda: wanted in sh("nft -t list set inet portward deny4"), wanted)


def _breaks() -> None:
    """The agent is ended in each way that an operator or systemd ends it, under traffic."""
    _daemon("red", "connect", "vni1001")
    with _mail():
        with _measured("systemctl restart"):
            sh("systemctl restart portward")
        with _measured("kill -9 of the agent"):
            _restarted(signal.SIGKILL)
        with _measured("watchdog: the agent is stopped (SIGSTOP)"):
            _restarted(signal.SIGSTOP)
            row("… by its watchdog", "", good="watchdog" in sh("journalctl -b -u portward --no-pager").lower())
        with _measured("upgrade of the package"):
            report(note=sh("dpkg -i /run/payload/new.deb"))
            _version(sh("dpkg-deb -f /run/payload/new.deb Version"))
        instances.upgraded(sh("dpkg-deb -f /run/payload/new.deb Version"))
        with _measured("downgrade of the package"):
            sh("dpkg -i /run/payload/old.deb")
            _version(sh("dpkg-deb -f /run/payload/old.deb Version"))
    kept = CONFIG.read_text()
    row("the configuration is the operator's own still", kept.splitlines()[0], good="cust*" in kept)


def _version(wanted: str) -> None:
    until(lambda: json.loads(sh("portward status --json", check=False) or "{}").get("version") == wanted, wanted)
    row("version that enforces", wanted, good=True)


def _demo() -> None:
    report(stage="the demo, on this kernel")
    said = sh("COLUMNS=120 portward lab demo", seconds=400, check=False)
    last = [line for line in said.splitlines() if " acts in " in line]
    row("portward lab demo", last or said[-600:], good=bool(last) and last[0].startswith("every act as expected"))
    if not last or "NOT" in last[0]:
        report(note="\n".join(line for line in said.splitlines() if "NOT" in line))


# --- without a store, then with a power cut and a broken configuration ---


def _without_store() -> None:
    report(stage=f"boot 3, {booted()}: the store is not to be reached", leaks=False)
    _wait_active()
    _nothing_came_out("from power-on")
    for segment in ALLOWED:
        row(f"the allowed tenant of {segment} connects", _connects(segment), good=_connects(segment) is not None)
    error = json.loads(sh("portward status --json"))["store_error"]
    row("status says what is wrong with the store", error, good=bool(error))
    Path("/var/lib/elsewhere").rename(_STORE)
    until(lambda: not json.loads(sh("portward status --json"))["store_error"], "the store is in step again")
    row("the store comes back", "in step", good=True)
    report(stage="a broken configuration, and a power cut")
    CONFIG.write_text("segments = [oops\n")
    _nothing_came_out("in this boot")
    os.sync()
    report(note="power cut")
    Path("/proc/sysrq-trigger").write_text("b")
    time.sleep(60)  # pause: the machine ends meanwhile


def _broken() -> None:
    report(stage=f"boot 4, {booted()}: after the power cut, with a broken configuration", leaks=False)
    until(lambda: watcher.read()["others"] > 20, "the tenants' packets to another port")
    _nothing_came_out("from power-on")
    failed = sh("systemctl is-active portward-baseline", check=False)
    row("portward-baseline failed, and stays so", failed, good=failed == "failed")
    row("what is loaded", _ours(), good=_ours() == _CLOSED)
    row("who may send cannot either", _connects("vni1001"), good=_connects("vni1001") is None)
    configure()
    _wait_active()
    row("mended: the agent starts by itself", _ours(), good=_ours() == _ENFORCES)
    row("… and who may send can", _connects("vni1001"), good=_connects("vni1001") is not None)
    _without_python()
    instances.waits()
    instances.appears()
    _demo()
    _nothing_came_out("until the package is removed")
    _removal()
    _off()


def _without_python() -> None:
    """Runs the baseline in a network namespace of its own, with a portward program that always fails."""
    sh("ip netns add bare")
    sh("unshare -m sh -c 'mount --bind /bin/false /usr/lib/portward/bin/portward; "
       "ip netns exec bare /usr/lib/portward/baseline'", check=False)  # fmt: skip
    tables = sh("ip netns exec bare nft list tables")
    good = all(f"{family} portward_closed" in tables for family in ("inet", "bridge"))
    row("where portward's own program fails, nft alone closes", tables, good=good)


def _removal() -> None:
    report(stage="remove and purge")
    said = sh("dpkg -r portward")
    row("remove says what stays", "", good="its ruleset stays in the kernel" in said)
    time.sleep(3)  # pause: a packet would come out by now
    _nothing_came_out("after the removal")
    report(leaks=True)
    said = sh("dpkg -P portward")
    row("purge says that it stops enforcing", "", good="STOPS ENFORCING" in said)
    row("… also in the namespace", "", good=f"is removed in namespace {instances.NAME}" in said)
    until(lambda: watcher.read()["leaked"] > 5, "packets come out")
    left = [path for path in ("/var/lib/portward", "/var/cache/portward", "/etc/portward") if Path(path).exists()]
    tables = sh("nft list tables")
    row("… and leaves nothing", left or tables or "no table", good=not left and "portward" not in tables)


# --- measuring ---


def _nothing_came_out(when: str) -> None:
    seen = watcher.newer()
    numbers = f"{seen['leaked']:.0f}, of other ports {seen['others']:.0f} ({seen['bridged']:.0f} bridged)"
    numbers += f", missed {seen['missed']:.0f}"
    good = seen["leaked"] == 0 and seen["others"] > seen["bridged"] > 0 and seen["missed"] == 0
    row(f"blocked tenants' packets to port 25 on the uplink, {when}", numbers, good=good)


@contextlib.contextmanager
def _measured(what: str) -> Iterator[None]:
    """Within the `with`, measures how long an allowed tenant's connections from new sources wait, and reports
    it."""
    report(stage=what)
    began = time.monotonic()
    yield
    _wait_active()
    end = time.monotonic()
    time.sleep(4)  # pause: so that waiting connections open
    waits = connect.read(began, end)
    worst = max((wait for wait in waits if wait is not None), default=None)
    lost = waits.count(None)
    numbers = f"longest wait {worst or 0:.2f} s, of {len(waits)}, {lost} not open; {end - began:.0f} s"
    # At least half of the expected attempts: the machine is slow, but the tenant must not have stopped trying.
    enough = len(waits) >= (end - began) / connect.EVERY / 2
    row(f"{what}: new connections", numbers, good=worst is not None and worst <= _WORST and not lost and enough)


@contextlib.contextmanager
def _mail() -> Iterator[None]:
    """One SMTP transfer that lasts as long as the `with`; reports whether it went through."""
    ENOUGH.unlink(missing_ok=True)
    sending = subprocess.Popen(
        ["ip", "netns", "exec", "red", sys.executable, "-B", "-m", "vm.guest.transfer", "vni1001"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(2)  # pause: the transfer is in its middle
    yield
    ENOUGH.touch()
    said = sending.communicate(timeout=60 * slower())[0].split()
    took, pause = ((RUN / "mails").read_text().splitlines() or ["0 0"])[-1].split()
    good = said == ["250", took]
    row(
        "an SMTP transfer went on through all of it",
        f"{took} bytes of {said[1:]}, longest pause {pause} s",
        good=good,
    )


def _connects(segment: str) -> float | None:
    """The seconds until a connection from a source without a cached verdict is open; None if it did not open."""
    _count[0] += 1
    namespace, prefix = SEGMENTS[segment][0], SEGMENTS[segment][4].partition("/")[0].rpartition(".")[0]
    code = (
        f"import socket, time; s = socket.socket(); s.settimeout(5); s.bind(('{prefix}.{_count[0]}', 0)); "
        f"b = time.monotonic(); s.connect(('203.0.113.25', 25)); print(round(time.monotonic() - b, 3))"
    )
    said = subprocess.run(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    return None if said.returncode else float(said.stdout)


_count = [1]


def _restarted(number: int) -> None:
    """Sends a signal to the agent, and waits until systemd has started another one."""
    before = _pid()
    os.kill(int(before), number)
    until(lambda: _pid() not in ("0", before), "another agent", seconds=90)


def _wait_active() -> None:
    until(lambda: sh("systemctl is-active portward", check=False) == "active", "portward is active", seconds=120)


def _pid() -> str:
    return sh("systemctl show -P MainPID portward")


def _journal_of(priority: int) -> str:
    return sh(f"journalctl -b -u portward -p {priority} -o cat --no-pager")


def _metric(name: str) -> str | None:
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9125/metrics').read().decode())"
    lines = [line for line in sh(f'{sys.executable} -c "{code}"').splitlines() if line.startswith(name)]
    return lines[0] if lines else None


def _daemon(namespace: str, module: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, "-B", "-m", f"vm.guest.{module}", *words],
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _off() -> None:
    report(end=True)
    sh("systemctl poweroff --force --force")
    time.sleep(60)  # pause: the machine ends meanwhile


def _reboot() -> None:
    # Tenants and watcher ignore SIGTERM, and systemd would wait for them for 90 seconds.
    folder = Path("/run/systemd/system.conf.d")
    folder.mkdir(exist_ok=True)
    (folder / "vm.conf").write_text("[Manager]\nDefaultTimeoutStopSec=3s\n")
    sh("systemctl daemon-reload; systemctl reboot")
    time.sleep(60)  # pause: the machine ends meanwhile


BOOTS = (_bare, _first, _without_store, _broken)

if __name__ == "__main__":
    main()
