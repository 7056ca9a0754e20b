"""The disk of a stock Debian, with its own kernel. It is kept between runs until this file changes.

The image contains two small systemd units of the test. They run programs from a second disk, which is made for
each run. So a change of a test does not need a new image.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from package import debian

_PACKAGES: Final = (
    "systemd-sysv", "udev", "kmod", "netbase", "linux-image-cloud-amd64",
    # The packages that portward depends on or recommends. The machine has no network to install them from.
    "python3", "nftables", "libnetfilter-queue1", "iproute2", "procps", "init-system-helpers",
    # For the kernel tests (suite.py).
    "conntrack", "ebtables", "iptables",
)  # fmt: skip
_DISK_BYTES: Final = 3 << 30
_UNITS: Final = {
    # Starts the tenants before any interface of the gateway is up: real tenants run already when a gateway boots.
    "vm-early.service": """\
[Unit]
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target portward-baseline.service systemd-networkd.service
After=systemd-udevd.service systemd-remount-fs.service
RequiresMountsFor=/run
[Service]
Type=oneshot
RemainAfterExit=yes
KillMode=none
ExecStartPre=/bin/mkdir -p /run/payload
ExecStartPre=/bin/mount -o ro /dev/vdb /run/payload
Environment=PYTHONPATH=/run/payload
ExecStart=/usr/bin/python3 -B -m vm.guest.world
[Install]
WantedBy=sysinit.target
""",
    "vm-late.service": """\
[Unit]
After=multi-user.target
[Service]
Type=exec
Environment=PYTHONPATH=/run/payload
ExecStart=/usr/bin/python3 -B -m vm.guest.stages
StandardOutput=journal
TimeoutStopSec=5s
[Install]
WantedBy=graphical.target
""",
}
_FILES: Final = {
    "etc/hostname": "gateway\n",
    "etc/hosts": "127.0.0.1 localhost gateway\n",
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
}


class Image(NamedTuple):
    """The files that qemu boots."""

    kernel: Path
    initrd: Path
    disk: Path


def image(cache: Path, release: str) -> Image:
    """The image of a release of Debian in the folder `cache`. If it is missing it is built, which takes a few
    minutes and downloads packages from the mirror that this machine's apt uses. Raises RuntimeError with the last
    lines of a command that failed."""
    place = cache / release
    folder = place / _recipe()
    found = Image(folder / "vmlinuz", folder / "initrd", folder / "disk")
    if not found.disk.exists():
        place.mkdir(parents=True, exist_ok=True)
        for old in (*place.iterdir(), *(one for one in cache.iterdir() if one.name not in debian.RELEASES)):
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            _make(Path(scratch), release)
            (Path(scratch) / "made").rename(folder)
    return found


def _recipe() -> str:
    """A digest of this file, which says how the image is built. The versions on the mirror are not part of it."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _make(scratch: Path, release: str) -> None:
    root, made = scratch / "root", scratch / "made"
    made.mkdir()
    debian.bootstrap(root, release, _PACKAGES)
    for name, text in _FILES.items():
        (root / name).write_text(text)
    for name, text in _UNITS.items():
        (root / "etc/systemd/system" / name).write_text(text)
    debian.run("chroot", root, "systemctl", "enable", "systemd-networkd.service", *_UNITS)
    debian.run(
        "chroot", root, "systemctl", "mask", "serial-getty@ttyS0.service", "systemd-networkd-wait-online.service"
    )
    debian.run("chroot", root, "systemctl", "set-default", "graphical.target")
    (root / "var/log/journal").mkdir(exist_ok=True)
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        (file,) = (root / "boot").glob(pattern)
        shutil.copyfile(file, made / name)
    disk(root, made / "disk", _DISK_BYTES)


def disk(folder: Path, path: Path, size: int) -> None:
    """Makes an ext4 file system of `size` bytes from a folder."""
    path.touch()
    os.truncate(path, size)
    debian.run("mke2fs", "-q", "-t", "ext4", "-d", folder, path)
