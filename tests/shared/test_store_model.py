"""The server's script against the state machine of a single client, and against each other's haste."""

from __future__ import annotations

import dataclasses
import random
import threading
import time

import pytest

from dspy_resilient.circuit import CircuitState
from dspy_resilient.outcomes import Outcome
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.shared import MemoryStore, RedisStore
from dspy_resilient.shared.store import CircuitReport, CircuitVerdict

STEPS = 400
POLICIES = [
    CircuitPolicy(failure_threshold=2, recovery_time=0.004, max_recovery_time=0.02, jitter=0.5,
                  probe_lease=0.01, window=0.05, slow_call=1, slow_rate=0.5, min_calls=3),
    CircuitPolicy(failure_threshold=50, failure_rate=0.4, min_calls=4, window=0.02, probes=2,
                  recovery_time=0.002, backoff=1, max_recovery_time=0.002, jitter=0,
                  successes_to_close=3),
]  # fmt: skip


class Client:
    """Says to a store whatever a client could, at random."""

    def __init__(self, policy, seed):
        self.random = random.Random(seed)
        self.policy = policy
        self.view = None
        self.probes = []

    def report(self):
        pick, view = self.random, self.view
        verdicts = tuple(self.verdict() for _ in range(pick.choice([0, 1, 1, 2])))
        wishes = pick.random() < 0.6
        rest = {
            "verdicts": verdicts,
            "probe": f"{pick.random()}" if wishes else None,
            "early": pick.random() < 0.2,
            "lease": self.policy.probe_lease,
            "draw": pick.random(),
        }
        if view is None or pick.random() < 0.05:  # by hand, or while the store was away
            state = pick.choice(list(CircuitState))
            remaining = pick.choice([0.0, 0.003, float("inf")])
            return CircuitReport(
                generation=pick.choice([None, 0]), state=state, age=pick.choice([0.0, 0.002]),
                remaining=remaining, failures=pick.randrange(3), openings=pick.randrange(3),
                reason="manual", error=None, **rest,
            )  # fmt: skip
        return CircuitReport(
            generation=view.generation, state=view.state, age=view.age, remaining=view.remaining,
            failures=view.failures, openings=view.openings, reason=view.reason, error=view.error,
            **rest,
        )  # fmt: skip

    def verdict(self):
        pick = self.random
        probe = self.probes.pop() if self.probes and pick.random() < 0.7 else None
        outcome = pick.choice([Outcome.SUCCESS, Outcome.FAILURE, Outcome.NEUTRAL])
        if outcome is Outcome.SUCCESS:
            number = 1 if probe else pick.randrange(1, 4)
            slow = pick.randrange(number + 1) if self.policy.slow_call is not None else 0
            return CircuitVerdict(outcome, number, slow, probe=probe)
        return CircuitVerdict(
            outcome, reason=pick.choice(["failures", "billing"]), error="e",
            retry_after=pick.choice([None, None, 0.003, -1.0]), probe=probe,
        )  # fmt: skip

    def hear(self, report, view):
        self.view = view
        if view.granted:
            self.probes.append(report.probe)


def same(one, other):
    """Whether two views say the same; times to the microsecond."""
    one, other = dataclasses.asdict(one), dataclasses.asdict(other)
    places, others = one.pop("places"), other.pop("places")
    assert places == pytest.approx(others, abs=2e-6)
    for name in ("at", "age", "remaining"):
        assert one.pop(name) == pytest.approx(other.pop(name), abs=2e-6), name
    assert one == other


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("clients", [1, 6])
def test_the_script_decides_as_the_state_machine_does(store, policy, clients):
    """Several clients at once: the answers are those of the machine, asked in the server's order.

    So every verb takes effect at one moment, as a whole, and the two implementations agree.
    """
    log, seed = [], random.randrange(2**32)
    print("seed", seed)

    def work(number):
        client = Client(policy, seed + number)
        for _ in range(STEPS // clients):
            report = client.report()
            view = store.circuit("{k}", policy, report)
            log.append((view.at, report, view))
            client.hear(report, view)
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
    seen = set()
    for at, report, view in log:
        now = at
        same(model.circuit("{k}", policy, report), view)
        seen.add(view.state)
    assert {"open", "half_open"} <= seen


def test_two_stores_at_one_address_are_one(valkey):
    """The state is the server's, not the connection's."""
    report = CircuitReport(
        generation=None, state=CircuitState.FORCED_OPEN, age=0, remaining=float("inf"), failures=0,
        openings=0, reason="manual", error=None,
    )  # fmt: skip
    one, two = RedisStore.at(valkey.url), RedisStore.at(valkey.url)
    said = one.circuit("{k}", POLICIES[0], report)
    heard = two.circuit("{k}", POLICIES[0], dataclasses.replace(report, generation=0))
    assert said.accepted
    assert not heard.accepted
    assert (heard.state, heard.generation) == ("forced_open", said.generation)
    one.close(), two.close()
