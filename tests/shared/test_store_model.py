"""The server's script against the state machine of a single client, and against each other's haste."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
import time

import pytest

from dspy_resilient.circuit import CircuitState
from dspy_resilient.outcomes import Outcome
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.shared import MemoryStore, RedisStore, redis_scripts
from dspy_resilient.shared.store import CircuitReport, CircuitVerdict

STEPS = 400
POLICIES = [
    CircuitPolicy(failure_threshold=2, recovery_time=0.004, max_recovery_time=0.02, jitter=0.5,
                  window=0.05, slow_call=1, slow_rate=0.5, min_calls=3),
    CircuitPolicy(failure_threshold=3, surprise=0.0, failure_rate=0.4, min_calls=4, window=0.02,
                  recovery_time=0.002, backoff=1, max_recovery_time=0.002, jitter=0),
    CircuitPolicy(failure_threshold=1, surprise=1e-2, recovery_time=0.004, jitter=0),
    CircuitPolicy.fuse(3, 0.02, recovery_time=0.003),
]  # fmt: skip


class Client:
    """Says to a store whatever a client could, at random."""

    def __init__(self, policy, seed):
        self.random = random.Random(seed)
        self.policy = policy
        self.view = None

    def report(self):
        pick, view = self.random, self.view
        verdicts = tuple(self.verdict() for _ in range(pick.choice([0, 1, 1, 2, 9])))
        rest = {"verdicts": verdicts, "probe": pick.random() < 0.6, "draw": pick.random()}
        if view is None or pick.random() < 0.05:  # by hand, or while the store was away
            state = pick.choice([each for each in CircuitState if each != "half_open"])
            remaining = pick.choice([0.0, 0.003, float("inf")])
            return CircuitReport(
                generation=pick.choice([None, 0]), state=state, age=pick.choice([0.0, 0.002]),
                remaining=remaining, run_age=pick.choice([0.0, 0.01]), failures=pick.randrange(3),
                share=pick.choice([0.0, 0.02, 0.5]), reason="manual", error=None, **rest,
            )  # fmt: skip
        return CircuitReport(
            generation=view.generation, state=view.state, age=view.age, remaining=view.remaining,
            run_age=view.run_age, failures=view.failures, share=view.share, reason=view.reason,
            error=view.error, **rest,
        )  # fmt: skip

    def verdict(self):
        pick = self.random
        if pick.random() < 0.3:
            age = pick.choice([0.0, 0.002, 0.5, 0.5, 0.5, 0.5])
            number = pick.randrange(1, 4)
            slow = pick.randrange(number + 1) if self.policy.slow_call is not None else 0
            late = pick.choice([0.0, 0.0, 0.001, 0.004, 0.3])  # 0.3: before any run began
            return CircuitVerdict(Outcome.SUCCESS, age, number, slow, late=late)
        age = pick.choice([0.0, 0.001, 0.005, 0.5])
        return CircuitVerdict(
            Outcome.FAILURE, age, reason=pick.choice(["failures", "failures", "billing"]), error="e",
            retry_after=pick.choice([None, None, 0.003, -1.0]),
        )  # fmt: skip


CLOCK = "string.format('%.17g', now)"


@pytest.fixture
def timed(store, monkeypatch):
    """Ask the store, and hear at what moment of its clock it has answered."""
    script = redis_scripts.CIRCUIT
    assert script.source.endswith("return view\n")
    source = script.source.removesuffix("return view\n") + f"return {{view, {CLOCK}}}\n"
    told = type(script).__new__(type(script))
    told.source, told.sha = source, hashlib.sha1(source.encode()).hexdigest()
    monkeypatch.setattr(redis_scripts, "CIRCUIT", told)

    def ask(key, policy, report):
        at = []

        def read(answer):
            at.append(float(answer[1]))
            return wanted.reading(answer[0])

        wanted = redis_scripts.circuit(key, policy, report)
        view = store._run(wanted._replace(reading=read))
        return at[0], view

    return ask


def same(one, other):
    """Whether two views say the same; times to the microsecond."""
    one, other = dataclasses.asdict(one), dataclasses.asdict(other)
    for name in ("age", "remaining", "run_age", "share"):
        assert one.pop(name) == pytest.approx(other.pop(name), abs=2e-6), name
    assert one == other


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("clients", [1, 6])
def test_the_script_decides_as_the_state_machine_does(timed, policy, clients):
    """Several clients at once: the answers are those of the machine, asked in the server's order.

    So every verb takes effect at one moment, as a whole, and the two implementations agree.
    """
    log, seed = [], random.randrange(2**32)
    print("seed", seed)

    def work(number):
        client = Client(policy, seed + number)
        for _ in range(STEPS // clients):
            report = client.report()
            at, view = timed("{k}", policy, report)
            log.append((at, report, view))
            client.view = view
            if client.random.random() < 0.3:
                time.sleep(client.random.random() * 0.008)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log) == STEPS // clients * clients
    log.sort(key=lambda entry: entry[0])
    assert len({at for at, *_ in log}) == len(log), "two answers at one moment have no order"
    now = 0.0
    model = MemoryStore(clock=lambda: now)
    seen, granted = set(), 0
    for at, report, view in log:
        now = at
        same(model.circuit("{k}", policy, report), view)
        seen.add(view.state)
        granted += view.granted
    assert {"open", "closed"} <= seen
    assert granted > 3 or clients > 1


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", ["memory", "valkey"])
@pytest.mark.parametrize("comes", ["while it runs", "once it is open"])
def test_a_success_told_late_is_no_news_of_what_came_after_it(valkey, at, late, comes):
    """A client that makes few calls tells of an answer long after; the outage began meanwhile."""
    policy = CircuitPolicy(failure_threshold=4, recovery_time=30)
    store = MemoryStore() if at == "memory" else RedisStore.at(valkey.url)
    failure = CircuitVerdict(Outcome.FAILURE, 10.0, reason="failures")  # all took 10 s to fail
    success = CircuitVerdict(Outcome.SUCCESS, 9.0, late=8.0 if late else 0.0)
    parts = [(failure, failure), (failure, failure)]
    parts.insert(1 if comes == "while it runs" else 2, (success,))
    view = None
    for verdicts in parts:
        report = CircuitReport(
            generation=view and view.generation, state=CircuitState.CLOSED, age=0.0, remaining=0.0,
            run_age=0.0, failures=view.failures if view else 0, share=0.02, reason=None, error=None,
            verdicts=verdicts,
        )  # fmt: skip
        view = store.circuit("{late}", policy, report)
    assert view.state == ("open" if late else "closed")
    store.close()


def test_two_stores_at_one_address_are_one(valkey):
    """The state is the server's, not the connection's."""
    report = CircuitReport(
        generation=None, state=CircuitState.FORCED_OPEN, age=0, remaining=float("inf"), run_age=0,
        failures=0, share=0.02, reason="manual", error=None,
    )  # fmt: skip
    one, two = RedisStore.at(valkey.url), RedisStore.at(valkey.url)
    said = one.circuit("{k}", POLICIES[0], report)
    heard = two.circuit("{k}", POLICIES[0], dataclasses.replace(report, generation=0))
    assert said.generation > 0
    assert (heard.state, heard.generation) == ("forced_open", said.generation)
    one.close(), two.close()
