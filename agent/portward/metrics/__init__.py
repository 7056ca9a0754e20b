"""How numbers get to Prometheus: families, exporter and HTTP server. Which metrics there are is in
`daemon.metrics`.

Invariants: a scrape never waits for the kernel and never delays a packet. A client, whatever it does, can
take only bounded descriptors, memory and processor time. Without an address to listen at, the agent enforces all
the same.

In reading order:

- `family`: what a metric is; a snapshot of numbers (pure)
- `exporter`: snapshot → the text of a scrape; the only module that imports prometheus_client
- `http`: bytes → request, answer → bytes (pure)
- `listeners`: sockets that listen
- `connection`: one client, and its timeouts
- `server`: the thread that answers scrapes, within its limits
"""
