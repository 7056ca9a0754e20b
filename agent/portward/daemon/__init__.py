"""The daemon: one process that writes the policy table and the kernel, and keeps the workers running.

Three threads work: policy, kernel and counting (`threads`). Only the policy thread writes the policy table, and
only the kernel thread writes the kernel. The asyncio loop only waits. The daemon never imports the worker: the two
processes share the table, a block of counters and a pipe.

Invariants: a step that fails is retried and counted, and opens nothing. A stop leaves ruleset and cached
verdicts in the kernel. The locks are held until no thread can write any more.

In reading order:

- `composition`: builds everything, starts it, runs the jobs, ends them; `run` is the entry point
- `core`: the steps of the three threads
- `intake`: policy thread: store, interfaces, time and configuration go into the policy table
- `bulk`: a large change of the table, in a process of its own
- `threads`: the three threads
- `steps`: how steps are run, retried and counted
- `timers`: when jobs run: periodic moments, readable descriptors

- `store_watch`: job: follows the store, ends grants
- `linkfeed`: jobs: follow the network interfaces
- `ruleset_watch`: job: checks the ruleset when something has changed it
- `health`: job: queries the workers; feeds systemd's watchdog
- `periodic`: jobs: counts packets, compares cached verdicts with the table, installs rate limits
- `config_reload`: job: puts a changed configuration in force
- `namespace_watch`: job: ends the agent of an instance when its network namespace has lost its name
- `status_writer`: job: refreshes metrics and status

- `counting`: counting thread: what the kernel has counted
- `countsfile`: the file with these counts
- `metrics`: every metric, and how it is read
- `status`: the status, from the metrics and the core

- `workers`: the worker processes
- `children`: a process that may outlive the daemon
- `child_output`: what such a process prints
- `runtime`: the lock, the status file and the crash report beside the table
- `settings`: the configuration in force, for other commands
- `systemd`: sd_notify, the watchdog, lines for the journal
- `shutdown`: the end of jobs and process
"""
