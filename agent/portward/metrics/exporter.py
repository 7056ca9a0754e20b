"""Turns the newest snapshot of numbers into the text that Prometheus scrapes.

The daemon reads the numbers once a second (`daemon.metrics`). A scrape takes the newest ones, so it never waits
for the kernel and never delays a packet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from portward import __version__
from portward.metrics.family import Family, Snapshot
from portward.metrics.http import Answer, Request


class Exporter(Collector):
    """Turns the newest snapshot into metrics at each scrape."""

    def __init__(self, families: Sequence[Family], newest: Callable[[], Snapshot]) -> None:
        self._families, self._newest = families, newest

    def collect(self) -> Iterator[Metric]:
        """The metrics of the newest snapshot, and the version of the agent."""
        snapshot = self._newest()
        info = GaugeMetricFamily("portward_build_info", "Version of the agent.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info
        for family in self._families:
            kind = CounterMetricFamily if family.counter else GaugeMetricFamily
            made = kind(f"portward_{family.name}", family.help, labels=family.labels)
            for labels, number in family.numbers(snapshot).items():
                made.add_metric(labels, number)
            yield made


def scrape_handler(families: Sequence[Family], newest: Callable[[], Snapshot]) -> Callable[[Request], Answer]:
    """A function that answers a scrape with the newest snapshot, in the format that the request prefers."""
    registry = CollectorRegistry()
    registry.register(Exporter(families, newest))
    application = make_wsgi_app(registry)

    def answer(request: Request) -> Answer:
        begun: list[Answer] = []
        environment = {
            "REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": request.query,
            "HTTP_ACCEPT": request.accept, "HTTP_ACCEPT_ENCODING": request.accept_encoding,
        }  # fmt: skip

        def begin(status: str, headers: list[tuple[str, str]], *_: object) -> Callable[[bytes], object]:
            begun.append(Answer(status, tuple(headers), b""))
            return lambda _: None

        body = b"".join(application(environment, begin))
        return begun[-1]._replace(body=body)

    return answer
