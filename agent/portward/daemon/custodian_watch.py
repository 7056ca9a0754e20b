"""The job that sees to it that portward's table has a custodian as long as it has an owner
(`dataplane.tableowner`)."""

from __future__ import annotations

from typing import Final

from portward.daemon.core import Core
from portward.daemon.ruleset_watch import OnKernel
from portward.daemon.steps import Step, StepRunner
from portward.daemon.timers import readable, until_tick

# After a reload the table may have an owner, or none any more. A custodian that ends wakes the job at once.
_INTERVAL_S: Final = 1.0


async def watch(core: Core, kernel: OnKernel, steps: StepRunner) -> None:
    """Never returns. `kernel` runs work on the kernel thread."""
    while True:
        # While the step waits after a failure, a custodian that has ended must not wake the job again and again.
        custodian = None if steps.seconds_to_retry(Step.CUSTODIAN) else core.table_owner.descriptor
        await readable(custodian, until_tick(_INTERVAL_S))
        if core.table_owner.has_ended or core.ownership.owned != core.table_owner.has_custodian:
            await steps.run(Step.CUSTODIAN, lambda: kernel(core.keep_table), None)
