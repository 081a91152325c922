"""A real scrape: what Prometheus gets to see of clients."""

from __future__ import annotations

import subprocess
import sys
import threading
from urllib.request import urlopen

import dspy
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from dspy_resilient import CircuitOpenError, Clients, RetryPolicy
from dspy_resilient.observe.prometheus import ClientCollector
from dspy_resilient.testing import Hold, Status, Truncated, rate_limited


@pytest.fixture
def scrape():
    """Register clients and read their metrics over HTTP: {(name, labels): value}."""
    registry = CollectorRegistry()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)

    def read(*clients):
        if clients:
            registry.register(ClientCollector(*clients))
        with urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as page:
            text = page.read().decode()
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        found = {(s.name, *sorted(s.labels.values())): s.value for s in samples}
        assert len(found) == len(samples)  # Prometheus refuses a series that comes twice
        return found

    yield read
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_scrape_shows_what_happened(scrape, make, provider, ask):
    """Calls, hits, failures by kind, refusals by reason, savings and answer times."""
    lm = make(name="fast", retry=RetryPolicy(base=0.0), max_wait=5)
    provider.script(None, Status(500), rate_limited("0.1"), None, Truncated())
    for prompt in ("a", "a", "b", "c"):
        ask(lm, prompt)
    lm.circuit.force_open()
    with pytest.raises(CircuitOpenError):
        ask(lm, "d")
    found = scrape(lm)
    (target,) = lm.circuits
    for name, labels, value in (
        ("calls_total", (), 5),
        ("hits_total", (), 1),
        ("errors_total", (), 1),
        ("attempts_total", (), 5),
        ("failures_total", (target, "failure"), 1),
        ("failures_total", (target, "throttled"), 1),
        ("rejected_total", ("circuit_open",), 1),
        ("skipped_total", ("truncated",), 1),
        ("stored_total", (), 2),
        ("answer_seconds_count", (), 3),
    ):
        assert found[(f"dspy_resilient_{name}", *sorted(("fast", *labels)))] == value, name
    assert found["dspy_resilient_tokens_saved_total", "fast"] > 0
    assert found["dspy_resilient_answer_seconds_sum", "fast"] == lm.stats().latency.total


def test_what_is_going_on_is_a_gauge(scrape, make, provider):
    """Calls under way, and how long a throttle gate stays closed."""
    lm = make(name="fast", max_wait=0)
    hold = Hold()
    provider.script(hold)
    caller = threading.Thread(target=lm, args=("a",))
    caller.start()
    provider.wait_for(1)
    found = scrape(lm)
    assert found["dspy_resilient_in_flight", "fast"] == 1
    (target,) = lm.circuits
    assert found[("dspy_resilient_throttled_seconds", *sorted(("fast", target)))] == 0
    hold.release()
    caller.join(20)
    provider.script(rate_limited(30))
    with pytest.raises(dspy.LMRateLimitError):
        lm("b", num_retries=0)
    found = scrape()
    assert found["dspy_resilient_in_flight", "fast"] == 0
    assert 0 < found[("dspy_resilient_throttled_seconds", *sorted(("fast", target)))] <= 30


def test_buckets_add_up(scrape, make):
    """They grow, and the last one holds every answer."""
    lm = make(name="fast", cache=False)
    for _ in range(3):
        lm("a")
    found = scrape(lm)
    buckets = [v for key, v in found.items() if key[0] == "dspy_resilient_answer_seconds_bucket"]
    assert buckets == sorted(buckets)
    assert found["dspy_resilient_answer_seconds_bucket", "+Inf", "fast"] == buckets[-1] == 3


def test_each_circuit_shows_its_state(scrape, make):
    """Exactly one state is 1, for the primary and for each fallback."""
    lm = make(name="fast", fallbacks=["openai/other"])
    first, second = lm.circuits
    lm.circuits[second].trip()
    found = scrape(lm)
    states = {key[1:]: value for key, value in found.items() if "circuit_state" in key[0]}
    assert len(states) == 10
    assert {key for key, value in states.items() if value} == {
        tuple(sorted(("fast", first, "closed"))),
        tuple(sorted(("fast", second, "open"))),
    }
    lm.circuits[second].reset()
    assert scrape()[("dspy_resilient_circuit_state", *sorted(("fast", second, "closed")))] == 1


def test_copies_count_once_and_namesakes_together(scrape, make):
    """No series comes twice, however many clients share a name."""
    lm, namesake = make(name="fast"), make(name="fast")
    lm("a")
    namesake("b")
    namesake.circuit.trip()
    found = scrape(lm, lm.copy(temperature=1.0), [namesake])
    assert found["dspy_resilient_calls_total", "fast"] == 2
    open_ones = [key for key, value in found.items() if "circuit_state" in key[0] and value]
    assert [("open" in key) for key in open_ones] == [True]


def test_a_collection_is_looked_through_at_every_scrape(scrape, make):
    """Clients that are started later are seen."""
    clients = []
    assert not any(key[0].endswith("calls_total") for key in scrape(clients))
    clients.append(make(name="late"))
    assert scrape()["dspy_resilient_calls_total", "late"] == 0


def test_named_clients_are_a_collection(scrape, provider):
    """`Clients` is given as it is."""
    with Clients() as clients:
        scrape(clients)
        clients.start("fast", "openai/test", api_base=provider.api_base, api_key="k")("a")
        assert scrape()["dspy_resilient_calls_total", "fast"] == 1


@pytest.mark.parametrize("wrong", ["fast", 3, None, dspy.LM("openai/test"), ["fast"]])
def test_what_is_no_client_is_refused(wrong):
    """When the collector is built, and by name."""
    with pytest.raises(TypeError, match="must be ResilientLMs or collections of them; got a "):
        ClientCollector(wrong)


def test_a_hostile_name_is_a_label_like_any_other(scrape, make):
    """Quotes and line breaks in a model's name spoil no scrape."""
    name = 'a"b\\c\nd{e="f"} 1'
    assert scrape(make(name=name))["dspy_resilient_calls_total", name] == 0


def test_it_is_loaded_only_when_asked_for():
    """`import dspy_resilient` needs no Prometheus."""
    code = "import sys, dspy_resilient; raise SystemExit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
