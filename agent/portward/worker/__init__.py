"""The worker process: gives every packet in one queue a verdict.

What always holds here: every packet gets exactly one verdict. A packet that cannot be classified is dropped, and
the kernel caches nothing for it. A verdict carries the epoch of the table generation under which it was found. The
worker only reads the policy table, and writes nothing but its counters and lines to the daemon. It imports nothing
of `daemon` or `dataplane`.

In reading order:

- `process`: starts, opens the table, serves the queue
- `batch`: the fast path, many packets at a time
- `slow_path`: the verdict of any single packet
- `messages`: nfnetlink_queue's messages as bytes; `nfqueue`: the socket for them
- `packet`: source and port of a packet
- `reset`: the RST of a rejected connection
- `handover`: taking the queue over from the worker before
- `single`: reading through the library NetfilterQueue instead
"""
