"""The custodian process: keeps the netlink socket that owns portward's table, so that the table has an owner also
while no agent runs.

A table with an owner (`flags owner, persist`, Linux 6.9) is changed by one netlink socket only. If that socket is
closed, the table stays, but any process may then change it or flush it. So a second process has the socket too.
The next agent gets it from there, with its address, and goes on as the owner. There is no moment without one.

What always holds here: it neither reads nor writes the netlink socket. It gives the socket only to root, to its
own user, and to the owner of the policy table's folder. It imports nothing of `daemon`, `dataplane` or `worker`,
and loads nothing after its start, because an upgrade may have replaced its files.

- `process`: the whole program
"""
