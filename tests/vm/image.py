"""The disk of a stock Debian 12, with its own kernel. It is kept between runs until this file changes.

The image contains two small systemd units of the test. They run programs from a second disk, which is made for
each run. So a change of a test does not need a new image.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

SUITE: Final = "bookworm"
PACKAGES: Final = (
    "systemd-sysv", "udev", "kmod", "netbase", "linux-image-cloud-amd64",
    # The packages that portward depends on or recommends. The machine has no network to install them from.
    "python3", "nftables", "libnetfilter-queue1", "iproute2", "procps", "init-system-helpers",
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


def image(cache: Path) -> Image:
    """The image in the folder `cache`. If it is missing it is built, which takes a few minutes and downloads
    packages from the mirror that this machine's apt uses. Raises RuntimeError with the last lines of a command
    that failed."""
    folder = cache / _recipe()
    found = Image(folder / "vmlinuz", folder / "initrd", folder / "disk")
    if not found.disk.exists():
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.iterdir():
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _make(Path(scratch))
            (Path(scratch) / "made").rename(folder)
    return found


def _recipe() -> str:
    """A digest of this file, which says how the image is built. The versions on the mirror are not part of it."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _make(scratch: Path) -> None:
    root, made = scratch / "root", scratch / "made"
    made.mkdir()
    # debootstrap mounts /proc and /sys below the folder. In a mount namespace of its own these mounts end with it,
    # even if it is killed. Otherwise removing the folder would reach into them.
    _run(
        "unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}",
        SUITE, root, mirror(),
    )  # fmt: skip
    for name, text in _FILES.items():
        (root / name).write_text(text)
    for name, text in _UNITS.items():
        (root / "etc/systemd/system" / name).write_text(text)
    _run("chroot", root, "systemctl", "enable", "systemd-networkd.service", *_UNITS)
    _run("chroot", root, "systemctl", "mask", "serial-getty@ttyS0.service", "systemd-networkd-wait-online.service")
    _run("chroot", root, "systemctl", "set-default", "graphical.target")
    (root / "var/log/journal").mkdir(exist_ok=True)
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        (file,) = (root / "boot").glob(pattern)
        shutil.copyfile(file, made / name)
    disk(root, made / "disk", _DISK_BYTES)


def mirror(suite: str = SUITE) -> str:
    """The URL of the mirror that this machine's apt uses for a release of Debian; RuntimeError if it has none."""
    said = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {suite}",
         "Origin: Debian"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    if not said:
        raise RuntimeError(f"this machine's apt knows no mirror of Debian {suite}")
    return said[0]


def disk(folder: Path, path: Path, size: int) -> None:
    """Makes an ext4 file system of `size` bytes from a folder."""
    path.touch()
    os.truncate(path, size)
    _run("mke2fs", "-q", "-t", "ext4", "-d", folder, path)


def _run(*words: str | Path) -> None:
    said = subprocess.run(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if said.returncode:
        raise RuntimeError(f"{words[0]} failed: " + " | ".join(said.stdout.splitlines()[-5:]))
