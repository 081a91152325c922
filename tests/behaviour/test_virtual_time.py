"""Weather of minutes and hours, in virtual time: what becomes of calls under the defaults."""

from __future__ import annotations

import math
from collections import Counter

import dspy
import pytest
from virtual_time import Drill, Fault, down, server_error

ALWAYS = (0.0, math.inf)
QUICK, SLOW = (0.01, 0.05), (3.0, 8.0)
"""How long a model takes to answer: a loopback provider, and a reasoning model."""


@pytest.mark.parametrize("latency", [(0.5, 2.0), SLOW], ids=["quick", "slow"])
def test_provider_that_fails_one_request_in_five_is_still_of_use(latency):
    """The circuit does not make of a bad provider no provider at all."""
    calls = failed = 0
    for seed in range(4):
        drill = Drill(down(server_error, ALWAYS, share=0.2), latency=latency, seed=seed)
        drill.run(callers=32, calls=40)
        calls += 32 * 40
        failed += drill.failed
    assert failed / calls < 0.02


@pytest.mark.parametrize("latency", [QUICK, (0.5, 2.0), SLOW], ids=["local", "quick", "slow"])
@pytest.mark.parametrize("seconds", [0.6, 2.0, 4.0])
def test_blip_is_ridden_out(latency, seconds):
    """The defaults lose no call to a provider that is gone for a moment."""
    blip = down(server_error, (10.0, 10.0 + seconds))
    drill = Drill(blip, latency=latency).run(callers=16, calls=math.ceil(20 / latency[1]))
    assert drill.failed == 0
    assert drill.seconds > 10 + seconds
    assert drill.sent > drill.answered or latency is SLOW  # a moment may pass between two of those


def test_outage_fails_fast():
    """An hour without a provider costs a caller `max_wait` once, and the provider little."""
    drill = Drill(down(server_error, ALWAYS)).run(callers=50, calls=20)
    assert drill.answered == 0
    assert drill.sent <= 50 + 20 * drill.seconds / 60
    assert 60 < drill.seconds / 20 < 60 * 1.25 + 10
    at_once = Drill(down(server_error, ALWAYS), max_wait=0).run(callers=50, calls=20)
    plain = Drill(down(server_error, ALWAYS), plain=True).run(callers=50, calls=20)
    assert plain.sent == 4 * 1000
    assert at_once.sent <= 0.02 * plain.sent


@pytest.mark.parametrize("callers", [1, 4, 32, 128])
@pytest.mark.parametrize(
    ("latency", "failure"),
    [((0.2, 1.0), None), ((3.0, 8.0), None), ((3.0, 8.0), 0.1)],
    ids=["quick", "slow", "slow, fails fast"],
)
def test_outage_shorter_than_max_wait_costs_no_answer(callers, latency, failure):
    """Of no length, and however many calls there are to make after it."""
    for number, seconds in enumerate((0.6, 5, 14, 25, 40, 54, 57, 58.5, 59.5, 59.9)):

        def fails(now, dice, seconds=seconds):
            return Fault(server_error(), failure) if 3 <= now < 3 + seconds else None

        drill = Drill(fails, latency=latency, seed=number).run(callers, calls=4)
        assert (drill.failed, drill.answered) == (0, 4 * callers), seconds


def test_retries_of_a_crowd_come_in_no_waves():
    """50 callers who fail together come back apart."""
    sent: list[float] = []

    def fails(now, dice):
        sent.append(now)
        return server_error()

    Drill(fails, latency=(0.0, 0.01), circuit=False, max_wait=0).run(callers=50, calls=1)
    retries = sent[50:]
    assert len(retries) == 3 * 50
    busiest = Counter(int(when * 10) for when in retries).most_common(1)[0][1]
    assert busiest <= 0.2 * len(retries)


def test_optimizer_waits_an_outage_out():
    """With `max_wait=900` every call of a run is answered after an outage of 5 minutes."""
    drill = Drill(down(server_error, (20.0, 320.0)), max_wait=900.0).run(callers=16, calls=40)
    assert drill.failed == 0
    assert drill.sent - drill.answered < 100  # a probe every 5 s, and those under way


def test_probe_that_is_lost_does_not_hold_up_those_who_wait():
    """A caller that waits sends the next in its time."""
    drill = Drill(lambda now, dice: None, max_wait=900.0)
    circuit = drill._lm.circuit
    circuit.force_half_open()
    lost = circuit.admit()
    drill.run(callers=3, calls=1)
    assert (drill.answered, drill.failed) == (3, 0)
    assert 1 < drill.seconds < 10
    assert not lost.reported


class Window:
    """Sixty requests in any minute; a refusal says when the next one will pass."""

    def __init__(self):
        self.taken = []

    def __call__(self, now, dice):
        self.taken = [when for when in self.taken if when > now - 60]
        if len(self.taken) < 60:
            self.taken.append(now)
            return None
        return throttled(self.taken[0] + 60 - now)


class Bucket:
    """One request a second, sixty at once after a pause; a refusal does not say when."""

    def __init__(self):
        self.level, self.at = 60.0, 0.0

    def __call__(self, now, dice):
        self.level, self.at = min(60.0, self.level + now - self.at), now
        if self.level < 1:
            return throttled(None)
        self.level -= 1
        return None


def throttled(hint):
    return dspy.LMRateLimitError("slow down", model="openai/test", status=429, retry_after=hint)


@pytest.mark.parametrize("limiter", [Window, Bucket])
def test_rate_limit_wastes_few_requests(limiter):
    """416 calls of 32 callers on 60 requests a minute: fewer requests than `dspy.LM` for an answer.

    A call may be held up for `max_wait` in all, so one in two hundred may go without one.
    """
    ours = Drill(limiter()).run(callers=32, calls=13)
    plain = Drill(limiter(), plain=True).run(callers=32, calls=13)
    assert ours.failed <= plain.failed + 0.005 * 416
    assert ours.sent / ours.answered < plain.sent / plain.answered
