"""DSPy's evaluation and optimizers through an outage: with plain `dspy.LM` and with `ResilientLM`.

    python tests/benchmarks/optimizers.py
    python tests/benchmarks/optimizers.py Evaluate GEPA --seconds 12

Over real HTTP, in real time, all with their defaults; the two sides run at the same time, each in a
process of its own beside a provider of its own, which goes away 2 s after the beginning. Printed
for each: how it ended, its score, calls lost, requests sent, and seconds.
"""

from __future__ import annotations

import argparse
import collections
import os
import time
from dataclasses import dataclass

from weather_http import LATENCY, SIDES, Cell, make, side_by_side, weather

EXAMPLES, THREADS = 32, 8


@dataclass(frozen=True)
class Found:
    """What became of one side's run."""

    ended: str
    score: float
    lost: int
    requests: int
    seconds: float


def evaluate(lm, program, data):
    import dspy

    return dspy.Evaluate(devset=data, metric=_says_so, num_threads=THREADS)(program).score


def mipro(lm, program, data):
    import dspy

    data = data[:EXAMPLES]
    optimizer = dspy.MIPROv2(metric=_says_so, auto=None, num_candidates=4, num_threads=THREADS)
    best = optimizer.compile(
        program, trainset=data, valset=data, num_trials=6, minibatch=False, seed=9
    )
    return best.score


def gepa(lm, program, data):
    import dspy

    data = data[:EXAMPLES]

    def feedback(gold, pred, *_):
        return dspy.Prediction(score=float(_says_so(gold, pred)), feedback="be brief")

    budget = EXAMPLES * 8
    optimizer = dspy.GEPA(
        metric=feedback, reflection_lm=lm, max_metric_calls=budget, num_threads=THREADS,
        track_stats=True, skip_perfect_score=False,
    )  # fmt: skip
    best = optimizer.compile(program, trainset=data, valset=data)
    return 100 * max(best.detailed_results.val_aggregate_scores)


WORK = {"Evaluate": evaluate, "MIPROv2": mipro, "GEPA": gepa}


def _says_so(example, prediction, *_):
    return float(len(prediction.answer) > 0)


def run(side, folder, barrier, pipe, name, seconds):
    """Do the work with one side; send what became of it."""
    os.environ["DSPY_CACHEDIR"] = folder
    import dspy

    from dspy_resilient.testing import Provider, dspy_answers

    lost = collections.Counter()

    class Watch(dspy.utils.BaseCallback):
        def on_lm_end(self, call_id, outputs, exception=None):
            lost[side] += exception is not None

    data = [
        dspy.Example(question=f"question {n}", answer="x").with_inputs("question")
        for n in range(10 * EXAMPLES)
    ]
    with Provider(dspy_answers(), latency=LATENCY) as provider:
        lm = make(side, provider.api_base)
        lm("warm up")
        provider.clear()
        dspy.configure(lm=lm, callbacks=[Watch()])
        program = dspy.Predict("question -> answer")
        ended, score = "done", 0.0
        barrier.wait()
        began = time.perf_counter()
        with weather(provider, Cell(name, outage=seconds)):
            try:
                score = WORK[name](lm, program, data)
            except Exception as error:  # whatever it is, the work is lost
                ended = type(error).__name__
        spent = time.perf_counter() - began
        pipe.send(Found(ended, score, lost[side], provider.count, spent))


def main():
    """Measure what is named, or all, and print two lines for each as soon as they are known."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {', '.join(WORK)}; default: all"
    )
    parser.add_argument("--seconds", type=float, nargs="*", default=[12.0, 20.0, 40.0])
    chosen = parser.parse_args()
    print(f"{'':22}{'':14}{'ended':>22}{'score':>8}{'lost':>6}{'requests':>10}{'seconds':>9}")
    for name in chosen.names or WORK:
        for seconds in chosen.seconds:
            for side, found in zip(SIDES, side_by_side(run, name, seconds), strict=True):
                print(
                    f"{name + f', gone {seconds:g} s':22}{side:14}{found.ended:>22}{found.score:>8.1f}"
                    f"{found.lost:>6}{found.requests:>10}{found.seconds:>9.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
