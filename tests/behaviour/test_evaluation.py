"""An outage during an evaluation is told from wrong answers."""

from __future__ import annotations

import json
import logging
import math

import dspy
import pytest

from dspy_resilient import BudgetExceededError, Evaluate, RetryPolicy
from dspy_resilient.testing import Status, dspy_answers

ONCE = RetryPolicy(max_attempts=1)


def examples(number):
    return [
        dspy.Example(question=f"q{i}", answer=f"{i % 2}").with_inputs("question")
        for i in range(number)
    ]


def right(example, prediction, trace=None):
    return float(example.answer == "0")


@pytest.fixture
def lm(make, provider):
    """A client that gives up at once, in a place where every second answer is right."""
    provider.answer = dspy_answers()
    lm = make(retry=ONCE, max_wait=0, circuit=False, cache=False)
    with dspy.context(lm=lm):
        yield lm


def evaluation(**options):
    settings = {"devset": examples(8), "metric": right, "num_threads": 1}
    return Evaluate(**{**settings, **options})


def qa():
    return dspy.Predict("question -> answer")


def test_lost_examples_have_no_score(lm, provider, caplog):
    """The score is that of the others; how many are lost, which, and why, is said."""
    provider.script(*[None] * 4, Status(500), Status(500), Status(401), None)
    with caplog.at_level(logging.WARNING, "dspy_resilient"):
        result = evaluation()(qa())
    assert result.score == 40.0  # 2 of 5
    assert [each.place for each in result.lost] == [4, 5, 6]
    assert [type(each.error).__name__ for each in result.lost] == [
        "LMServerError",
        "LMServerError",
        "LMAuthError",
    ]
    assert [math.isnan(score) for *_, score in result.results] == [False] * 4 + [True] * 3 + [False]
    assert "lost=3 (2 LMServerError, 1 LMAuthError)" in repr(result)
    assert "3 of 8: 2 LMServerError, 1 LMAuthError" in caplog.text
    plain = dspy.Evaluate(devset=examples(8), metric=right, num_threads=1)
    provider.script(*[None] * 4, Status(500), Status(500), Status(401), None)
    assert plain(qa()).score == 25.0  # DSPy's: as if they were wrong


def test_only_lost_examples_are_repeated(lm, provider):
    """Until nothing is lost: then the score is that of an evaluation without an outage."""
    provider.script(None, Status(500), None, Status(500), Status(500))
    result = evaluation()(qa())
    assert [each.place for each in result.lost] == [1, 3, 4]
    provider.clear()
    provider.script(None, Status(500))
    result = result.repeat()
    assert provider.count == 3
    assert [each.place for each in result.lost] == [3]
    result = result.repeat()
    assert provider.count == 4
    assert (result.score, result.lost) == (50.0, [])
    assert result.repeat() is result


@pytest.mark.parametrize("threads", [1, 4])
def test_without_losses_it_is_dspys(lm, threads):
    """The same score and results."""
    mine = evaluation(num_threads=threads)(qa())
    other = dspy.Evaluate(devset=examples(8), metric=right, num_threads=threads)(qa())
    assert (mine.score, mine.lost) == (other.score, [])
    assert [score for *_, score in mine.results] == [score for *_, score in other.results]
    assert isinstance(mine, type(other))


def test_all_lost_is_no_score(lm, provider):
    """Not 0."""
    provider.down("500")
    result = evaluation()(qa())
    assert math.isnan(result.score)
    assert len(result.lost) == 8


def test_too_many_losses_end_it_and_say_why(lm, provider):
    """As DSPy's `max_errors` does, whose error says nothing."""
    provider.down("500")
    with pytest.raises(Exception, match="cancelled") as caught:
        evaluation(max_errors=3)(qa())
    assert caught.value.__notes__ == ["lost, not wrong: 3 LMServerError"]


def test_a_metric_that_fails_loses_its_example(lm):
    """It has not said that the answer is wrong."""

    def picky(example, prediction):
        return right(example, prediction) if example.question != "q3" else 1 / 0

    result = evaluation(metric=picky)(qa())
    assert [(each.place, type(each.error)) for each in result.lost] == [(3, ZeroDivisionError)]


def test_a_budget_ends_it(lm):
    """It is no loss, but the end."""
    with pytest.raises(BudgetExceededError), lm.budget(requests=2):
        evaluation()(qa())


def test_equal_examples_are_told_apart(lm, provider):
    """Each has its own place and error."""
    twice = [*examples(1), *examples(1)]
    provider.script(Status(500), Status(401))
    result = evaluation(devset=twice)(qa())
    assert [type(each.error).__name__ for each in result.lost] == ["LMServerError", "LMAuthError"]


def test_files_show_what_is_missing(lm, provider, tmp_path):
    """A lost example is nan there, not 0."""
    provider.script(Status(500))
    evaluation(save_as_json=str(tmp_path / "all.json"))(qa())
    rows = json.loads((tmp_path / "all.json").read_text())
    assert [math.isnan(row["right"]) for row in rows] == [True] + [False] * 7


def test_with_dspys_own_evaluation_a_loss_is_said(lm, provider, caplog):
    """With defaults too: a call that ends with an error is a warning, and counted."""
    provider.script(Status(500))
    with caplog.at_level(logging.WARNING, "dspy_resilient"):
        dspy.Evaluate(devset=examples(2), metric=right, num_threads=1)(qa())
    assert lm.stats().errors == 1
    assert any(
        record.name == "dspy_resilient" and record.levelno >= logging.WARNING
        for record in caplog.records
    )


def test_a_failure_score_is_refused():
    """It would be a wrong answer again."""
    with pytest.raises(TypeError, match="failure_score"):
        Evaluate(devset=[], failure_score=0.0)
