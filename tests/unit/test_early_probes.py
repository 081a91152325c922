"""Early probes: with every circuit open, somebody still looks now and then.

Of the changes of one operator, constant or statement in `early.py`, the one that no test notices
returns None for False.
"""

from __future__ import annotations

import math
import os
import threading

import pytest

from dspy_resilient import CircuitBreaker, CircuitPolicy, CircuitState
from dspy_resilient.circuit import EarlyProbes
from dspy_resilient.testing.clock import Clock

POLICY = CircuitPolicy(failure_threshold=1, recovery_time=5.0, backoff=2.0, jitter=0.0)


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def circuit(clock):
    """A circuit that has been opened for 100 s."""
    breaker = CircuitBreaker(POLICY, clock=clock)
    breaker.trip(retry_after=100)
    return breaker


def test_before_the_recovery_time_nobody_is_early(circuit, clock):
    """The first opening lasts as long as it would have."""
    assert circuit.early_wait == 5.0
    clock.advance(4.9)
    assert circuit.try_admit(early=True) is None
    assert circuit.state is CircuitState.OPEN


def test_an_early_probe_is_a_probe(circuit, clock):
    """It makes the circuit half-open, holds its place, and its failure reopens it for longer."""
    clock.advance(5)
    assert circuit.try_admit() is None
    probe = circuit.try_admit(early=True)
    assert probe.probe
    assert circuit.state is CircuitState.HALF_OPEN
    assert circuit.try_admit(early=True) is None  # one at a time
    probe.failure("down")
    assert circuit.state is CircuitState.OPEN
    assert circuit.open_remaining == 10
    assert circuit.early_wait == 5.0


def test_early_probes_can_close_it(circuit, clock):
    """As any others."""
    clock.advance(5)
    circuit.try_admit(early=True).success()
    circuit.try_admit().success()
    assert circuit.state is CircuitState.CLOSED


@pytest.mark.parametrize("force", [None, "force_open", "force_closed", "force_half_open"])
def test_only_an_open_circuit_is_probed_early(clock, force):
    """A person's word stands: what was forced open stays so."""
    breaker = CircuitBreaker(POLICY, clock=clock)
    if force is not None:
        getattr(breaker, force)()
    clock.advance(1000)
    assert breaker.early_wait == math.inf
    assert (breaker.try_admit(early=True) is None) == (force == "force_open")


def test_one_early_probe_per_recovery_time_for_all_circuits_together(clock):
    """Not one per target."""
    early = EarlyProbes(clock)
    circuits = [CircuitBreaker(POLICY, clock=clock) for _ in range(3)]
    for circuit in circuits:
        circuit.trip(retry_after=100)
    clock.advance(4.9)
    assert not any(map(early.take, circuits))
    clock.advance(0.1)
    assert [early.take(circuit) for circuit in circuits] == [True, False, False]
    clock.advance(4.9)
    assert not any(map(early.take, circuits))
    clock.advance(0.1)
    assert [early.take(circuit) for circuit in reversed(circuits)] == [True, False, False]


def test_of_many_threads_one_is_early(clock, circuit):
    """However many ask at once."""
    early = EarlyProbes(clock)
    clock.advance(5)
    barrier, taken = threading.Barrier(32), []

    def ask():
        barrier.wait()
        if early.take(circuit):
            taken.append(1)

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_of_a_fork_goes_on(clock, circuit):
    """A lock that another thread held at the fork stays behind."""
    early = EarlyProbes(clock)
    clock.advance(5)
    with early._lock:
        child = os.fork()
        if child == 0:
            taken = []
            asking = threading.Thread(target=lambda: taken.append(early.take(circuit)), daemon=True)
            asking.start()
            asking.join(10)
            os._exit(0 if taken == [True] else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
