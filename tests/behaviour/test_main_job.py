"""The main job: `dspy.Evaluate` over 120 examples on 8 threads, in fair weather and in foul.

The model knows nine capitals of ten. Whatever happens to the provider meanwhile, the score is the
one of a run without faults.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import random
import threading
import time
from pathlib import Path

import dspy
import pytest

from dspy_resilient import CircuitPolicy
from dspy_resilient.testing import Provider, Status, dspy_answers, rate_limited

DATA = Path(__file__).parents[1] / "data" / "capitals.csv"
ROWS = list(csv.DictReader(DATA.read_text().splitlines()))
KNOWN = {row["country"]: row["capital"] for number, row in enumerate(ROWS) if number % 10}
EXAMPLES = [
    dspy.Example(country=row["country"], capital=row["capital"]).with_inputs("country")
    for row in ROWS
]
SCORE = 90.0

LONG = "DSPY_RESILIENT_LONG" in os.environ
"""Whether to try blips and outages in full length on the default circuit, which takes minutes."""


def exact(example, prediction, trace=None):
    return example.capital == prediction.capital


def evaluate(lm):
    run = dspy.Evaluate(devset=EXAMPLES, metric=exact, num_threads=8, display_progress=False)
    with dspy.context(lm=lm):
        return run(dspy.Predict("country -> capital")).score


@pytest.fixture
def told(caplog):
    """Return what DSPy has logged so far; its logger keeps it from pytest's."""
    logger = logging.getLogger("dspy")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


def blip(provider, after, mode, seconds):
    """Take the provider away for a while, once it has had `after` requests."""
    provider.wait_for(after, timeout=60)
    provider.down(mode)
    time.sleep(seconds)  # the length of the blip is what is tried here
    provider.up()


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
    """One request in six fails in one way or another."""
    faults = itertools.cycle([Status(500), Status(503), Status(502)])
    provider.script(*(next(faults) if number % 6 == 5 else None for number in range(300)))
    assert evaluate(make()) == SCORE


def test_429s(provider, make):
    """Some requests are throttled, with a hint and without."""
    odds = random.Random(8)
    hints = [rate_limited("0.2"), rate_limited("0")]
    provider.script(*(odds.choice(hints) if odds.random() < 0.05 else None for _ in range(300)))
    assert evaluate(make()) == SCORE


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("seconds", "mode"),
    itertools.product([0.6, 2.0, 4.0], ["refuse", "500"])
    if LONG
    else [(0.6, "500"), (2.0, "refuse"), (4.0, "500")],
)
def test_blips(provider, make, mode, seconds):
    """The provider is gone for a while in the middle of the run; the defaults ride it out."""
    lm = make()

    weather = threading.Thread(target=blip, args=(provider, 40, mode, seconds))
    weather.start()
    score = evaluate(lm)
    weather.join()
    assert score == SCORE
    assert lm.stats().errors == 0


@pytest.mark.parametrize("mode", ["refuse", "500"])
def test_outage_with_patience(provider, make, mode):
    """With a large `max_wait` a run through an outage ends like one without."""
    brisk = CircuitPolicy(recovery_time=0.1, max_recovery_time=0.8)
    lm = make(circuit=True if LONG else brisk, max_wait=900)
    weather = threading.Thread(target=blip, args=(provider, 40, mode, 30.0 if LONG else 2.0))
    weather.start()
    score = evaluate(lm)
    weather.join()
    assert score == SCORE
    assert lm.stats().errors == 0
    assert provider.count <= len(EXAMPLES) + 8 + 10  # those under way, and a few probes


def test_outage_without_patience(provider, make, told):
    """With `max_wait=0` the run ends at once, having asked little, and says why."""
    lm = make(max_wait=0, num_retries=0)
    provider.down("500")
    begun = time.monotonic()
    with pytest.raises(Exception, match="cancelled due to errors"):
        evaluate(lm)
    assert time.monotonic() - begun < 10
    assert provider.count <= 5 + 7  # the eighth thread may have been first
    assert "is open (failures): try again in" in told()


# Optimizers: once in fair weather, once through a blip, and the same comes out.

TRAIN = EXAMPLES[:6]


def bootstrap(lm):
    optimizer = dspy.BootstrapFewShot(metric=exact, max_bootstrapped_demos=3)
    compiled = optimizer.compile(dspy.Predict("country -> capital"), trainset=TRAIN)
    return [dict(demo) for demo in compiled.demos]


def mipro(lm):
    optimizer = dspy.MIPROv2(
        metric=exact,
        auto=None,
        num_candidates=2,
        max_bootstrapped_demos=1,
        max_labeled_demos=1,
        num_threads=2,
        verbose=False,
    )
    compiled = optimizer.compile(
        dspy.Predict("country -> capital"),
        trainset=TRAIN,
        valset=TRAIN,
        num_trials=2,
        minibatch=False,
        data_aware_proposer=False,
        tip_aware_proposer=False,
    )
    return compiled.score, compiled.signature.instructions, len(compiled.demos)


def gepa(lm):
    def feedback(example, prediction, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=float(exact(example, prediction)), feedback="so-so")

    optimizer = dspy.GEPA(
        metric=feedback,
        max_metric_calls=20,
        reflection_lm=lm,
        reflection_minibatch_size=2,
        num_threads=2,
        track_stats=True,
        seed=0,
    )
    compiled = optimizer.compile(dspy.Predict("country -> capital"), trainset=TRAIN, valset=TRAIN)
    return compiled.signature.instructions, compiled.detailed_results.val_aggregate_scores


@pytest.mark.timeout(120)
@pytest.mark.parametrize("optimize", [bootstrap, mipro, gepa])
@pytest.mark.parametrize("seconds", [0.6, 2.0, 4.0] if LONG else [0.6])
def test_optimizer_rides_out_a_blip(provider, make, plain, optimize, seconds):
    """Demos, instructions and scores are those of plain dspy.LM in fair weather."""
    with dspy.context(lm=(other := plain(cache=False))):
        expected = optimize(other)
    provider.clear()
    lm = make(circuit=True if LONG else CircuitPolicy(recovery_time=0.3))
    weather = threading.Thread(target=blip, args=(provider, 2, "500", seconds))
    with dspy.context(lm=lm):
        weather.start()
        found = optimize(lm)
    weather.join()
    assert found == expected
    assert lm.stats().errors == 0
    assert lm.stats().failures > 0


@pytest.mark.parametrize("optimize", [bootstrap, mipro, gepa])
def test_optimizer_without_patience(provider, make, told, optimize):
    """In an outage, `max_wait=0` brings it to an end, or to its senses, at once."""
    lm = make(max_wait=0, num_retries=0)
    provider.down("500")
    while lm.circuit.state == "closed":
        with pytest.raises(dspy.LMServerError):
            lm("?")
    begun, raised = time.monotonic(), ""
    try:
        with dspy.context(lm=lm):
            optimize(lm)
    except Exception as error:
        raised = str(error)
    assert time.monotonic() - begun < 20
    assert provider.count <= 5 + 1  # one probe, if it took that long
    assert "is open (failures): try again in" in raised + told()
