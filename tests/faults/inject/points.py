"""The functions of portward before or after which the harness ends a process, and the kind of process that calls
them.

Python imports this module before portward. So it imports only the standard library until `find` is called.
"""

from __future__ import annotations

import importlib
from typing import Any, Final, NamedTuple


class Point(NamedTuple):
    """A function of portward. `where` is `module:name` or `module:Class.name`. `process` is the kind of process
    that calls it: daemon, worker or apply. `when` is the event on which it does: change (of policy), start, empty
    (a start without a table), packet, time, repair (of rules), links. The action is due at the `nth` call."""

    process: str
    when: str
    where: str
    nth: int = 1

    @property
    def name(self) -> str:
        """The point as one word, for names of tests."""
        return f"{self.where.split(':')[1]}#{self.nth}@{self.when}"


_D, _K, _W, _I = "portward.daemon", "portward.dataplane", "portward.worker", "portward.ipc"
_T, _S = "portward.table", "portward.store"
POINTS: Final = (
    # a change of policy, in the order of its steps
    Point("daemon", "change", f"{_S}.sqlite.store:SqliteStore.revision"),
    Point("daemon", "change", f"{_T}.follower:Follower.step"),
    Point("daemon", "change", f"{_T}.writer:Writer.apply"),
    Point("daemon", "change", f"{_T}.writer:Writer._next_head"),
    Point("daemon", "change", f"{_K}.sync:KernelSync._carry_out"),
    Point("daemon", "change", f"{_K}.verdict_cache:VerdictCache.move_epoch"),
    Point("daemon", "change", f"{_K}.sync:reach"),
    Point("daemon", "change", f"{_K}.verdict_cache:VerdictCache.forget"),
    Point("daemon", "change", f"{_K}.nfnetlink:KernelElements.commit"),
    Point("daemon", "change", f"{_K}.nfnetlink:KernelElements.commit", 2),
    Point("daemon", "change", f"{_K}.nfsocket:NfSocket._wait"),
    # the start, in the order of its steps
    Point("daemon", "start", "portward.daemon.runtime:Runtime.__init__"),
    Point("daemon", "start", f"{_T}.writer:Writer.decide_due"),
    Point("daemon", "start", f"{_T}.writer:Writer.put_links"),
    Point("daemon", "start", f"{_D}.workers:Worker.start"),
    Point("daemon", "start", f"{_K}.sync:KernelSync._derive"),
    Point("daemon", "start", f"{_K}.xtables:install"),
    Point("daemon", "start", f"{_K}.nft:Nft.replace"),
    Point("daemon", "start", f"{_K}.reconciler:RulesetReconciler.load"),
    Point("daemon", "empty", f"{_T}.writer:Writer.replace"),
    # another program has changed the ruleset
    Point("daemon", "repair", f"{_K}.reconciler:RulesetReconciler.repair"),
    Point("daemon", "repair", f"{_K}.xtables:install"),
    Point("daemon", "repair", f"{_K}.nft:Nft.replace"),
    Point("daemon", "repair", f"{_K}.verdict_cache:VerdictCache.forget_everything"),
    # interfaces come and go
    Point("daemon", "links", f"{_T}.writer:Writer.put_links"),
    Point("daemon", "links", f"{_K}.verdict_cache:VerdictCache.forget_within"),
    # periodic jobs
    Point("daemon", "time", "portward.daemon.runtime:Runtime.write_status"),
    Point("daemon", "time", f"{_K}.accounting:PacketAccounting.take_all"),
    Point("daemon", "time", f"{_K}.reconciler:RulesetReconciler.intact"),
    # a batch of packets in the worker, in order: the table is open, a verdict is found, counted, sent
    Point("worker", "packet", f"{_T}.reader:Reader._follow"),
    Point("worker", "packet", f"{_W}.messages:Verdicts.accept"),
    Point("worker", "packet", f"{_I}.counters:WorkerCounters.add"),
    Point("worker", "packet", f"{_W}.nfqueue:Queue.send"),
    Point("worker", "start", f"{_W}.nfqueue:Queue.__init__"),
    Point("worker", "start", f"{_T}.reader:Reader.open"),
    # `portward apply`
    Point("apply", "change", f"{_S}.sqlite.store:SqliteStore.write"),
    Point("apply", "change", f"{_S}.sqlite.store:SqliteStore._put"),
    Point("apply", "change", f"{_S}.sqlite.store:notify_followers"),
)


def find(point: Point) -> tuple[Any, str, Any]:
    """The module or class that holds the function, the function's name, and the raw attribute, which may be a
    `classmethod` object. Raises ImportError or AttributeError if there is no such function."""
    module, _, name = point.where.partition(":")
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for step in path:
        holder = getattr(holder, step)
    getattr(holder, last)
    return holder, last, vars(holder).get(last, getattr(holder, last))
