"""A gateway in network namespaces, with tenants, mail servers and the real agent, to try portward and to test it.

Invariants: no packet leaves the machine, because no namespace of a lab has a link to its network.

In reading order: `topology`, the namespaces of a lab and their addresses · `namespaces`, how one is made, entered
and removed · `agent`, the real agent in the gateway · `mail`, SMTP servers and senders · `demo`, the acts of
`portward lab demo` · `standing`, a lab for `portward lab up`.
"""
