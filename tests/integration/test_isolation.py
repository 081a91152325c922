"""Whatever happens to one client, another notices nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dspy
import pytest

from dspy_resilient import CachePolicy, CircuitPolicy, LimitPolicy, ResilientLM
from dspy_resilient.testing import Hold, Provider

CROWD = 1000


@contextlib.contextmanager
def beside(work):
    """Go on doing `work` on a thread of its own, again and again, during the block."""
    over = threading.Event()

    def again():
        while not over.wait(0.001):
            with contextlib.suppress(dspy.LMError):
                work()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)


@contextlib.contextmanager
def open_circuit(make, others):
    """A hundred callers wait for its circuit, while others are refused."""
    lm = make(cache=False, max_wait=600, circuit=CircuitPolicy(failure_threshold=1))
    lm.circuit.force_open("down")
    impatient = lm.copy(max_wait=0)
    with ThreadPoolExecutor(100) as pool:
        calls = [pool.submit(lm, "?") for _ in range(100)]
        with beside(lambda: impatient("?")):
            yield lm
        lm.close(grace=0)
        for each in calls:
            assert each.exception(30) is not None


@contextlib.contextmanager
def crash_loop(make, others):
    """It is restarted all the time, and most of its calls are refused."""
    lm = make(cache=False, limits=2)

    def crash():
        lm._runtime.routes.find(lm, {}).limiter._leases = None
        try:
            lm("?")
        finally:
            lm.restart()

    with beside(crash):
        yield lm
    assert lm.stats().restarts > 0


@contextlib.contextmanager
def queue(make, others):
    """A thousand callers wait for its one place."""
    hold = Hold()
    with Provider("Paris") as slow:
        slow.always(hold)
        lm = make(cache=False, limits=LimitPolicy(max_concurrent=1), api_base=slow.api_base)
        entered = threading.Event()

        async def crowd():
            calls = [asyncio.ensure_future(lm.acall("?")) for _ in range(CROWD)]
            while lm.health().queued < CROWD - 1:  # noqa: ASYNC110  # there is no event for it
                await asyncio.sleep(0.01)
            entered.set()
            await asyncio.gather(*calls, return_exceptions=True)

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(asyncio.run, crowd())
            assert entered.wait(30)
            yield lm
            lm.close(grace=0)
            done.result(30)
            hold.release()


@contextlib.contextmanager
def full_disk(make, others):
    """Its cache can be written nowhere, and its memory holds one answer."""
    blocked = others / "a file"
    blocked.write_text("in the way")
    lm = make(name="full", cache=CachePolicy(max_entries=1, disk=str(blocked / "folder")))
    numbers = iter(range(10**9))
    with beside(lambda: lm(f"{next(numbers)}")):
        yield lm
    assert lm.stats().evicted > 0


def timed(ask, lm, count):
    """Ask `count` new questions; return the median of the seconds that the answers took."""
    seconds = []
    for number in range(count):
        started = time.perf_counter()
        assert ask(lm, f"{number} of {count}") == ["Paris"]
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@pytest.mark.filterwarnings("ignore:.*disk.*:UserWarning")
@pytest.mark.parametrize("trouble", [open_circuit, crash_loop, queue, full_disk])
def test_one_clients_trouble_is_not_anothers(make, ask, tmp_path, trouble):
    """Same answers, same numbers and about the same time, at the same endpoint with the same key.

    The times of a busy machine prove little; an effect of what is waited for here, seconds, would
    show all the same.
    """
    lm = make(name="calm", limits=4)
    alone = timed(ask, lm, 11)
    with trouble(make, tmp_path) as other:
        beside_it = timed(ask, lm, 31)
        assert other.name != lm.name
    stats = lm.stats()
    assert (stats.attempts, stats.hits, stats.errors) == (42, 0, 0)
    assert (stats.failures, stats.retries, stats.rejected, stats.restarts) == (0, 0, 0, 0)
    assert lm.circuit.state == "closed"
    assert lm.circuit.failure_count == 0
    assert beside_it < 10 * alone + 0.1


SCOPES = {
    "bedrock/m": ("aws_region_name", "us-east-1", "eu-west-1"),
    "vertex_ai/m": ("vertex_location", "us-central1", "europe-west1"),
    "openai/m": ("organization", "org-a", "org-b"),
}


@pytest.mark.parametrize("model", SCOPES)
def test_fallbacks_that_differ_in_scope_alone_have_circuits_of_their_own(model):
    name, *scopes = SCOPES[model]
    backups = [dspy.LM(model, **{name: scope}) for scope in scopes]
    with ResilientLM("openai/primary", api_key="k", fallbacks=backups) as lm:
        circuits = {id(each): label for label, each in lm.circuits.items()}
        assert len(circuits) == 1 + len(scopes)
        assert all(any(scope in label for label in circuits.values()) for scope in scopes)


class OneOrganizationFails(BaseHTTPRequestHandler):
    """Answers as OpenAI does: to one of its customers with errors alone."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        failing = self.headers["openai-organization"] == "org-a"
        self.server.asked.append(self.headers["openai-organization"])
        said = {"message": {"role": "assistant", "content": "Paris"}, "index": 0}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                  "choices": [{**said, "finish_reason": "stop"}]}  # fmt: skip
        body = json.dumps({"error": {"message": "down"}} if failing else answer).encode()
        self.send_response(500 if failing else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def organizations():
    with ThreadingHTTPServer(("127.0.0.1", 0), OneOrganizationFails) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_trouble_of_one_organization_is_not_anothers(organizations, make, ask):
    """At one address, with one key: the circuit of one opens, and the other is asked as before."""
    base = f"http://127.0.0.1:{organizations.server_port}/v1"
    there = {"api_base": base, "num_retries": 0, "max_wait": 0, "cache": False}
    there["circuit"] = CircuitPolicy(recovery_time=60)
    backup = make(organization="org-b", **there)
    lm = make(organization="org-a", fallbacks=[backup], **there)
    for number in range(30):
        assert ask(lm, f"{number}") == ["Paris"]
    refused = lm.circuit.policy.failure_threshold
    assert organizations.asked.count("org-a") == refused
    assert organizations.asked.count("org-b") == 30
    states = {label: circuit.state for label, circuit in lm.circuits.items()}
    assert sorted(states.values()) == ["closed", "open"], states
