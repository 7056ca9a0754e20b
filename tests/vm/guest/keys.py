"""Keeps the kernel from patching its own code under traffic, which qemu's emulation does not always survive.

The kernel switches a static key where the first one who needs a path comes, or the last one goes: it patches
its code by way of a breakpoint while the other CPU executes it. There qemu 7.2, with a thread for each CPU, now
and then sees that breakpoint for ever, and the machine stands still. So what is needed at times is needed here
all the time.
"""

from __future__ import annotations

import socket

from vm.guest.machine import sh

_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_TIMESTAMP = 29  # SO_TIMESTAMP


def hold_hooks() -> None:
    """A chain in each hook of netfilter, in a namespace without packets: the keys are the same in all of them.
    portward's baseline is up by then, so it is still the first one that needs nftables' modules."""
    chains = " ".join(f"chain {hook} {{ type filter hook {hook} priority 0; }};" for hook in _HOOKS)
    sh(f"ip netns add hooks; ip netns exec hooks nft 'table inet held {{ {chains} }}'")


def hold_timestamps(view: socket.socket) -> None:
    """A socket that wants to know when its packets came, as systemd-networkd's do while it starts."""
    view.setsockopt(socket.SOL_SOCKET, _TIMESTAMP, 1)
