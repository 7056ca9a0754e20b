"""`portward check`: would `portward run` begin with this configuration? Changes nothing."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from portward import config as configuration
from portward.documents import mistake
from portward.errors import KernelError
from portward.gateway import keeper, others, ruleset, xtables
from portward.gateway.nfnetlink import NfNetlink
from portward.gateway.nft import Nft
from portward.gateway.surroundings import Surroundings
from portward.policy import preset as presets
from portward.store import open_store


def check(path: Path, *, with_store: bool = True) -> Iterator[str]:
    """Lines that say what was found, as it is found; raises PortwardError at the first thing that is wrong.

    Not `with_store`: an agent that has a policy table begins also where its store cannot be reached."""
    config = configuration.load(path)
    yield f"{path}: segments {', '.join(config.segments)}; uplinks {', '.join(config.uplinks)}"
    if config.table.exists() and not config.table.is_dir():
        raise mistake(path, f"{str(config.table)!r} is no folder", "table")
    preset = presets.load(config.preset, named_in=path)
    yield f"preset {preset.name}: ports {', '.join(map(str, preset.ports))}, mode {config.mode}"
    names = [name for _, name in socket.if_nameindex()]
    for kind, patterns in (("segments", config.segments), ("uplinks", config.uplinks)):
        for pattern in patterns:
            found = [name for name in names if configuration.matches((pattern,), name)]
            yield f"{kind} {pattern!r}: {', '.join(found) or 'no such interface now'}"
    netlink = NfNetlink()
    keeper.loaded(netlink)  # libnftables would write to stderr itself where the kernel may not be asked
    nft = Nft()
    native = xtables.has_native_queue(nft)
    state = ruleset.State(0, synced=False)
    around = others.seen(netlink)
    surroundings = Surroundings(guard=around.guard)
    try:
        nft.check(ruleset.wanted(config, preset, native=native, state=state, surroundings=surroundings).text)
    except KernelError as error:
        raise KernelError(f"the kernel does not take the ruleset: {error}") from None
    if not native:
        xtables.require(netlink)
    yield f"the kernel takes the ruleset; queue by {'nft' if native else 'the xtables NFQUEUE target'}"
    for line in around.why:
        yield f"{line}: what is forwarded is judged again (forward guard)"
    if not with_store:
        return
    # It is the verbs' to run, not the agent's, which begins without it and sees less of the file system.
    if (command := config.exemptions.check) and shutil.which(command[0]) is None:
        yield f"exemptions.check: {command[0]} cannot be run here: each request for review waits for a person"
    store = open_store(config.store)
    yield f"store {config.store}: revision {store.revision()}"
    store.close()
