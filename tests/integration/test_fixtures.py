"""The fixtures that users ask for, in a test suite as users write it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

from dspy_resilient import CachePolicy, RetryPolicy
from dspy_resilient.testing import Status

SUITE = """
import asyncio, dspy, pytest
from dspy_resilient import CircuitBreaker, CircuitPolicy, CircuitOpenError, ClientClosedError
from dspy_resilient.testing import Status, dspy_answers, rate_limited

made = []

def test_a_program_survives_a_bad_minute(provider, make_lm):
    provider.answer = dspy_answers({"Capital of France?": "Paris"})
    provider.script(Status(503), rate_limited(0.1))
    lm = make_lm()
    made.append(lm)
    with dspy.context(lm=lm):
        answer = dspy.Predict("question -> answer")(question="Capital of France?").answer
    assert (answer, provider.count) == ("Paris", 3)

def test_the_last_client_was_closed_and_nothing_is_left(provider, make_lm):
    with pytest.raises(ClientClosedError):
        made[0]("a")
    assert provider.count == 0
    asyncio.run(make_lm().acall("once"))
    asyncio.run(make_lm().acall("once"))
    assert provider.count == 2  # neither shares an answer with the other, or with the last run

def test_an_outage(provider, make_lm):
    lm = make_lm(num_retries=0, max_wait=0, circuit=CircuitPolicy(failure_threshold=1))
    provider.down("500")
    with pytest.raises(dspy.LMServerError):
        lm("a")
    with pytest.raises(CircuitOpenError):
        lm("b")

def test_a_circuit_without_waiting(clock):
    breaker = CircuitBreaker(CircuitPolicy(jitter=0), clock=clock)
    breaker.trip()
    clock.advance(5)
    assert breaker.state == "half_open"
"""


def test_a_suite_of_ones_own(tmp_path):
    """One line in `conftest.py`, and the fixtures are there (`dspy_resilient.testing`)."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["dspy_resilient.testing.fixtures"]\n')
    (tmp_path / "test_mine.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert "4 passed" in done.stdout, done.stdout


def test_nobody_pays_who_does_not_ask():
    """Nothing is registered with pytest: its start imports neither DSPy nor us."""
    assert not [e for e in entry_points(group="pytest11") if "dspy" in e.value]


def test_our_own_tests_use_them(make_lm, provider, clock):
    """With the defaults that a test wants, each of which can be changed."""
    lm = make_lm()
    assert lm.cache_policy.disk is None
    assert lm._runtime.retry == RetryPolicy(base=0.01)
    provider.script(Status(500), None)
    assert make_lm(num_retries=1, cache=CachePolicy(disk=None, ttl=5.0))("a")
    assert clock() == 0.0
