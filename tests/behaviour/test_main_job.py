"""The main job: `dspy.Evaluate` over 120 examples on 8 threads, in fair weather and in foul.

The model knows nine capitals of ten. Whatever happens to the provider meanwhile, the score is the
one of a run without faults.
"""

from __future__ import annotations

import csv
import itertools
import random
import threading
import time
from pathlib import Path

import dspy
import pytest

from dspy_resilient.testing import Provider, Status, dspy_answers, rate_limited

DATA = Path(__file__).parents[1] / "data" / "capitals.csv"
ROWS = list(csv.DictReader(DATA.read_text().splitlines()))
KNOWN = {row["country"]: row["capital"] for number, row in enumerate(ROWS) if number % 10}
EXAMPLES = [
    dspy.Example(country=row["country"], capital=row["capital"]).with_inputs("country")
    for row in ROWS
]
SCORE = 90.0


def exact(example, prediction, trace=None):
    return example.capital == prediction.capital


def evaluate(lm):
    run = dspy.Evaluate(devset=EXAMPLES, metric=exact, num_threads=8, display_progress=False)
    with dspy.context(lm=lm):
        return run(dspy.Predict("country -> capital")).score


@pytest.fixture
def provider():
    """A model that knows most capitals and takes 20 ms to say so."""
    with Provider(dspy_answers(lambda country: KNOWN.get(country, "no idea")), latency=0.02) as p:
        yield p


def test_fair_weather(provider, make, plain):
    """The same score as plain dspy.LM, with one request for each example."""
    assert evaluate(make()) == SCORE
    assert provider.count == len(EXAMPLES)
    assert evaluate(plain(cache=False)) == SCORE


def test_single_errors(provider, make):
    """One request in six fails in one way or another (R50)."""
    faults = itertools.cycle([Status(500), Status(503), Status(502)])
    provider.script(*(next(faults) if number % 6 == 5 else None for number in range(300)))
    assert evaluate(make()) == SCORE


def test_429s(provider, make):
    """Some requests are throttled, with a hint and without (R28)."""
    odds = random.Random(8)
    hints = [rate_limited("0.2"), rate_limited("0")]
    provider.script(*(odds.choice(hints) if odds.random() < 0.05 else None for _ in range(300)))
    assert evaluate(make()) == SCORE


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["refuse", "500"])
@pytest.mark.parametrize("seconds", [0.6, 2.0, 4.0])
def test_blips(provider, make, mode, seconds):
    """The provider is gone for a while in the middle of the run; the defaults ride it out (R27)."""
    lm = make()

    def blip():
        provider.wait_for(40, timeout=60)
        provider.down(mode)
        time.sleep(seconds)  # the length of the blip is what is tried here
        provider.up()

    weather = threading.Thread(target=blip)
    weather.start()
    score = evaluate(lm)
    weather.join()
    assert score == SCORE
    assert lm.stats().errors == 0
