"""Counters of our own: a scrape sees what prometheus_client's would show after the same counts."""

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics

from layercast.server.counting import Count, Family, Level, Spread

BOUNDS = (0.001, 0.1, 1.0)


def lines(registry: CollectorRegistry) -> list[str]:
    """The text of a scrape without the times of creation, which ours do not tell."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_a_scrape_sees_the_same_as_of_prometheus_clients_own():
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counters = (
        Family("calls_total", "Calls", "counter", ["a", "b"], Count, ours),
        prometheus_client.Counter("calls", "Calls", ["a", "b"], registry=theirs),
    )
    gauges = (
        Family("rows", "Rows", "gauge", ["a"], Level, ours),
        prometheus_client.Gauge("rows", "Rows", ["a"], registry=theirs),
    )
    histograms = (
        Family("took_seconds", "Time", "histogram", [], lambda: Spread(BOUNDS), ours),
        prometheus_client.Histogram("took_seconds", "Time", [], buckets=BOUNDS, registry=theirs),
    )
    for counter in counters:
        counter.labels("x", 1).inc()
        counter.labels("x", 1).inc(2.5)
        counter.labels('quo"te\n', 2)
    for gauge in gauges:
        gauge.labels("x").set(7)
    for histogram in histograms:
        one = histogram.labels() if isinstance(histogram, Family) else histogram
        for value in (0.0, 0.001, 0.0011, 0.1, 0.5, 1.0, 3.0):
            one.observe(value)
    assert lines(ours) == lines(theirs)
    assert b"calls_total" in open_metrics(ours)


def test_a_level_rises_and_falls():
    level = Level()
    level.add(2)
    level.add(-1)
    assert list(level.samples()) == [("", {}, 1)]


def test_removed_series_are_gone_and_begin_at_zero_again():
    registry = CollectorRegistry()
    family = Family("calls_total", "Calls", "counter", ["model", "version", "code"], Count, registry)
    for version in ("1", "2"):
        for code in ("OK", "CANCELLED"):
            family.labels("m", version, code).inc()
    family.remove_by_labels({"model": "m", "version": "1"})
    found = {sample.labels["version"] for metric in registry.collect() for sample in metric.samples}
    assert found == {"2"}
    assert family.labels("m", "1", "OK").value == 0


def test_a_wrong_number_of_labels_and_a_second_family_of_a_name_are_refused():
    registry = CollectorRegistry()
    family = Family("calls_total", "Calls", "counter", ["a"], Count, registry)
    with pytest.raises(ValueError, match="calls has the labels a, got 2 values"):
        family.labels("x", "y")
    with pytest.raises(ValueError, match="Duplicated"):
        Family("calls", "Calls", "counter", ["a"], Count, registry)
