"""Keeps the kernel from patching its own code under traffic, because that can hang qemu.

The kernel switches a static key when the first user of a code path appears, and when the last one goes. To do so
it patches its code by way of a breakpoint while the other CPU may execute that code. With one thread for each CPU,
qemu 7.2 sometimes goes on executing the breakpoint after the kernel has removed it, and the machine hangs. The
functions below are permanent users of such paths, so the keys are not switched during a test.
"""

from __future__ import annotations

import socket

from vm.guest.machine import sh

_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_TIMESTAMP = 29  # SO_TIMESTAMP


def hold_hooks() -> None:
    """Adds a chain to each hook of netfilter, in a namespace without traffic. This holds the keys for all
    namespaces. It runs after portward's baseline, so the test still shows that the baseline can load nftables'
    modules."""
    chains = " ".join(f"chain {hook} {{ type filter hook {hook} priority 0; }};" for hook in _HOOKS)
    sh(f"ip netns add hooks; ip netns exec hooks nft 'table inet held {{ {chains} }}'")


def hold_timestamps(view: socket.socket) -> None:
    """Makes a socket ask for timestamps of its packets, which holds the key that systemd-networkd switches."""
    view.setsockopt(socket.SOL_SOCKET, _TIMESTAMP, 1)
