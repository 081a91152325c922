"""What a cached answer looks like: everywhere that `dspy.LM` shows one, ours looks the same."""

from __future__ import annotations

import io
import re

import dspy
import pytest

from dspy_resilient.testing import dspy_answers

TOOL_CALL = {"text": "see", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}


def printed(lm, n):
    """Return what `inspect_history` prints, but for the time."""
    text = io.StringIO()
    lm.inspect_history(n, file=text)
    return re.sub(r"\[\d{4}-.*?\]", "[TIME]", text.getvalue())


@pytest.mark.parametrize("model_type", ["chat", "text", "responses"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "rollout_id": 3}, {"n": 2}], ids=str)
def test_a_hit(compare, call, model_type, settings):
    """Outputs, usage {}, old cost, callbacks and the marked response are dspy.LM's."""

    def twice(lm):
        return call(lm, "q", **settings), call(lm, "q", **settings)

    theirs, mine = compare(twice, model_type=model_type, may_raise=True)
    assert theirs.hits == ([False, True] if theirs.error is None else [])
    assert mine.attempts == ([1, 0] if theirs.error is None else [])


def test_a_hit_with_tool_calls(compare, call):
    """What is not text comes back in the same form."""
    theirs, _ = compare(lambda lm: (call(lm, "q"), call(lm, "q")), answer=TOOL_CALL)
    assert theirs.hits == [False, True]


def test_a_hit_of_a_program(compare, call):
    """The adapter's messages, the prediction and its usage."""

    def twice(lm):
        program = dspy.ChainOfThought("question -> answer")
        with dspy.context(track_usage=True, usage_tracker=None):
            first = call(program, question="Capital of France?")
            second = call(program, question="Capital of France?")
        return first, second, first.get_lm_usage(), second.get_lm_usage()

    theirs, mine = compare(twice, answer=dspy_answers())
    assert theirs.result[2]["openai/gpt-4o-mini"]["total_tokens"] > 0
    assert theirs.result[3] == {}
    assert mine.hits == [False, True]


def test_the_tracker_counts_no_hit(compare, call):
    """`dspy.track_usage` has one entry for two equal calls."""

    def tracked(lm):
        with dspy.track_usage() as usage:
            call(lm, "q")
            call(lm, "q")
        return dict(usage.usage_data)

    theirs, _ = compare(tracked)
    assert len(theirs.result["openai/gpt-4o-mini"]) == 1


def test_inspect_history_prints_the_same(compare, call):
    """For an answer, a hit and a program's call, but for the time."""

    def shown(lm):
        call(lm, "q")
        call(lm, "q")
        call(dspy.Predict("question -> answer"), question="q")
        return printed(lm, 3), printed(lm, 1)

    theirs, _ = compare(shown, answer=dspy_answers())
    assert "User message" in theirs.result[0]


def test_global_and_module_history(compare, call):
    """Entries also reach DSPy's global history and the calling module's."""

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.inner = dspy.Predict("question -> answer")

        def forward(self, question):
            return self.inner(question=question)

        async def aforward(self, question):
            return await self.inner.acall(question=question)

    def recorded(lm):
        from dspy.clients.base_lm import GLOBAL_HISTORY

        program = Program()
        call(program, question="q")
        call(program, question="q")
        entries = lm.history
        same = [GLOBAL_HISTORY[-2:], program.history, program.inner.history]
        return [
            [entry is other for entry, other in zip(entries, each, strict=True)] for each in same
        ]

    theirs, _ = compare(recorded, answer=dspy_answers())
    assert theirs.result == [[True, True]] * 3


@pytest.mark.parametrize(
    "settings",
    [{"disable_history": True}, {"max_history_size": 0}, {"max_history_size": 1}],
    ids=str,
)
def test_history_can_be_limited(compare, call, settings):
    """`disable_history` and `max_history_size` mean the same, for answers and for hits."""

    def asked(lm):
        with dspy.context(**settings):
            out = call(lm, "q"), call(lm, "q"), call(lm, "other")
        return out, len(lm.history)

    theirs, _ = compare(asked)
    assert len(theirs.requests) == 2


def test_who_sees_the_callbacks(compare, call):
    """One pair of on_lm callbacks per call, a hit's and a failing call's included."""

    def asked(lm):
        call(lm, "q", temperature=0.1)
        call(lm, "q", temperature=0.1)
        with pytest.raises(ValueError, match="n must be"):
            call(lm, "q", n=0)

    theirs, _ = compare(asked)
    kinds = [each[0] for each in theirs.callbacks]
    assert kinds == ["start", "end"] * 3
    assert theirs.callbacks[0][1]["prompt"] == "q"


def test_the_cache_can_be_bypassed(compare, call):
    """`cache=False` for one call, for a copy and as attribute; rollouts and settings."""

    def asked(lm):
        call(lm, "q", temperature=1.0)
        call(lm, "q", temperature=1.0, cache=False)
        call(lm.copy(cache=False), "q", temperature=1.0)
        call(lm.copy(rollout_id=1, temperature=1.0), "q")
        call(lm.copy(rollout_id=1, temperature=1.0), "q")
        call(lm, "q", temperature=1.0, rollout_id=1)
        call(lm, "q", temperature=0.9)
        lm.cache = False
        call(lm, "q", temperature=0.9)
        call(lm, "q", temperature=0.9, cache=True)

    theirs, _ = compare(asked)
    assert len(theirs.requests) == 6


def test_outputs_may_be_changed(compare, call):
    """What a caller does to an answer does not reach the next caller's.

    Wanted difference: nor does it reach the history, where dspy.LM shows what became of it.
    """

    def asked(lm):
        call(lm, "q").append("mine")
        return call(lm, "q")

    theirs, mine = compare(asked, but=("history",))
    assert theirs.result == ["Paris"]
    assert theirs.history[0]["outputs"] == ["Paris", "mine"]
    assert mine.history[0]["outputs"] == ["Paris"]
