"""What is done to the gateway, boot after boot. Which boot this is stands in a file on the machine's own disk."""

from __future__ import annotations

import time
import traceback
from pathlib import Path

from vm.guest import machine, watcher
from vm.guest.machine import row, sh
from vm.guest.told import tell

_STATE = Path("/var/lib/vm-stage")


def main() -> None:
    """Runs the stages of this boot and goes on to the next one; the last one switches the machine off."""
    number = int(_STATE.read_text()) if _STATE.exists() else 0
    _STATE.write_text(str(number + 1))
    try:
        BOOTS[number]()
    except Exception:
        row("no surprise", "an exception", good=False)
        tell(note=traceback.format_exc())
        _off()


def _bare() -> None:
    tell(stage=f"a stock Debian, {machine.booted()}: without portward")
    time.sleep(5)
    seen = watcher.read()
    row("blocked tenants' packets to port 25 come out", f"{seen['leaked']:.0f}", good=seen["leaked"] > 100)
    tell(stage="the package is installed")
    sh("dpkg -i /run/payload/old.deb")
    row("nothing is enforced yet", sh("nft list tables"), good="portward" not in sh("nft list tables"))
    machine.configure()
    tell(note=sh("portward check --without-store"))
    sh("systemctl start portward-baseline")
    tell(note=sh("systemctl status portward-baseline --no-pager; portward apply /run/vm/inventory.json"))
    sh("systemctl start portward", seconds=60)
    tell(
        note=sh(
            "systemctl status portward --no-pager; portward status; systemd-analyze security portward --no-pager | tail -n 3; journalctl -u portward --no-pager | tail -n 20; ls -la /proc/net/netfilter/; id portward; grep -h -E 'Uid|Cap' /proc/$(systemctl show -P MainPID portward)/status"
        )
    )
    _off()


def _off() -> None:
    tell(end=True)
    sh("systemctl poweroff --force --force")


BOOTS = (_bare,)

if __name__ == "__main__":
    main()
