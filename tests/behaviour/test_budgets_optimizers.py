"""DSPy's optimizers inside a budget: they end at once, and another run goes on where they were."""

from __future__ import annotations

import dspy
import pytest

from dspy_resilient import BudgetExceededError, CachePolicy, ResilientLM
from dspy_resilient.testing import Provider, dspy_answers


def examples(number):
    return [
        dspy.Example(question=f"q{i}", answer="x").with_inputs("question") for i in range(number)
    ]


def never(*_):
    return False


def length(example, prediction, *_):
    return float(len(prediction.answer) % 2)


def feedback(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return dspy.Prediction(score=float(len(pred.answer) % 2), feedback="be brief")


def bootstrap(lm, program, data):
    optimizer = dspy.BootstrapFewShot(never, max_bootstrapped_demos=4, max_errors=1000)
    return optimizer.compile(program, trainset=data)


def mipro(lm, program, data):
    optimizer = dspy.MIPROv2(
        metric=length,
        prompt_model=lm,
        task_model=lm,
        auto=None,
        num_candidates=3,
        max_errors=1000,
        num_threads=4,
    )
    return optimizer.compile(
        program, trainset=data, valset=data, num_trials=4, minibatch=False, seed=9
    )


def gepa(lm, program, data):
    optimizer = dspy.GEPA(metric=feedback, reflection_lm=lm, max_metric_calls=60, num_threads=4)
    return optimizer.compile(program, trainset=data, valset=data)


def simba(lm, program, data):
    optimizer = dspy.SIMBA(metric=length, bsize=8, max_steps=1, num_candidates=3, num_threads=4)
    return optimizer.compile(program, trainset=data)


@pytest.fixture
def run(tmp_path):
    """Run an optimizer against a provider of its own, within `requests` if that is given."""

    def go(optimize, provider, *, folder, requests=None):
        lm = ResilientLM(
            "openai/test",
            api_base=provider.api_base,
            api_key="k",
            cache=CachePolicy(disk=str(tmp_path / folder)),
        )
        with lm, dspy.context(lm=lm):
            if requests is None:
                optimize(lm, dspy.Predict("question -> answer"), examples(12))
            else:
                with lm.budget(requests=requests):
                    optimize(lm, dspy.Predict("question -> answer"), examples(12))
        return lm

    return go


@pytest.mark.timeout(120)
@pytest.mark.parametrize("optimize", [bootstrap, mipro, gepa, simba])
def test_an_optimizer_ends_with_the_budget_and_goes_on_later(run, optimize):
    """With that error, not after `max_errors`; a second run sends only what the first did not."""
    with Provider(dspy_answers()) as provider:
        run(optimize, provider, folder="whole")
        whole = provider.count
    half = whole * 2 // 3
    with Provider(dspy_answers()) as provider:
        with pytest.raises(BudgetExceededError):
            run(optimize, provider, folder="parts", requests=half)
        assert provider.count == half
        lm = run(optimize, provider, folder="parts", requests=2 * half)
        assert lm.stats().attempts == whole - half
        assert provider.count == whole


def test_without_a_block_an_optimizer_goes_on_with_wrong_answers(run):
    """What the block is for: DSPy's own code takes any error of the LM for a failed example."""
    with Provider(dspy_answers()) as provider:
        provider.down("500")
        lm = dspy.LM(
            "openai/test", api_base=provider.api_base, api_key="k", num_retries=0, cache=False
        )
        with dspy.context(lm=lm):
            bootstrap(lm, dspy.Predict("question -> answer"), examples(12))
        assert provider.count == 12
