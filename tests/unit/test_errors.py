"""The error tree is as drawn, and DSPy takes none of it for something else."""

from __future__ import annotations

import copy
import pickle

import circuitbreaker
import dspy
import pytest

from dspy_resilient import errors
from dspy_resilient.errors import (
    AllTargetsFailedError,
    CallRejectedError,
    CircuitOpenError,
    ResilienceError,
)

OURS = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and each.__module__ == errors.__name__
]


def drawn_tree():
    """Read the tree at the top of errors.py: the parent of each class, by indentation."""
    parents, path = {}, []
    for line in errors.__doc__.split("\n\n")[1].splitlines():
        name = line.lstrip(" │├└─").split()[0]
        depth = line.index(name)
        path = [(other, at) for other, at in path if at < depth]
        parents[name] = path[-1][0] if path else None
        path.append((name, depth))
    return parents


def test_the_tree_is_as_drawn():
    """What errors.py draws is what it defines (section 2)."""
    drawn = drawn_tree()
    assert drawn.pop("dspy.LMError") is None
    assert drawn.pop("ResilienceError") == "dspy.LMError"
    assert ResilienceError.__bases__ == (dspy.LMError,)
    assert drawn == {
        each.__name__: each.__bases__[0].__name__ for each in OURS if each is not ResilienceError
    }


def test_an_open_circuit_is_also_the_packages_error():
    """Code that catches circuitbreaker's error catches ours (section 2)."""
    assert issubclass(CircuitOpenError, circuitbreaker.CircuitBreakerError)


@pytest.mark.parametrize("kind", OURS)
def test_none_is_retried_by_dspy_or_taken_for_a_bad_answer(kind):
    """Neither DSPy's retry loop nor an adapter or ReAct catches one (section 2)."""
    assert not dspy.is_retryable_lm_error(kind("no"))
    assert not issubclass(kind, (ValueError, TypeError, dspy.AdapterParseError))


@pytest.mark.parametrize("kind", OURS)
def test_each_has_a_code_of_its_own(kind):
    """A program can tell them apart without the class."""
    assert kind("no").code == kind.default_code
    assert [each.default_code for each in OURS].count(kind.default_code) == 1


def full(kind):
    details = {"client": "fast", "retry_after": 2.5, "model": "openai/x"}
    if kind is CircuitOpenError:
        details |= {"reason": "failures", "last_error": "LMServerError 500"}
    if kind is AllTargetsFailedError:
        details["errors"] = [dspy.LMServerError("down", status=500), CircuitOpenError("open")]
    error = kind("client 'fast': no {answer}", **details)
    error.attempts = (("openai/x", "failure", 0.1),)
    return error


def facts(error):
    return {
        name: [facts(each) for each in value] if name == "errors" else value
        for name, value in {**vars(error), "class": type(error), "text": str(error)}.items()
    }


@pytest.mark.parametrize(
    "twin_of",
    [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deepcopy"],
)
@pytest.mark.parametrize("kind", OURS)
def test_each_can_be_pickled_and_copied(kind, twin_of):
    """An error survives the way back from another process with all it carries."""
    error = full(kind)
    twin = twin_of(error)
    assert facts(twin) == facts(error)
    assert repr(twin) == repr(error)


@pytest.mark.parametrize("kind", OURS)
def test_each_says_what_happened_and_carries_what_helps(kind):
    """The message is the message, whatever other base a class has (section 2)."""
    error = full(kind)
    assert str(error) == "[openai/x] client 'fast': no {answer}"
    assert error.message in repr(error)
    assert (error.client, error.retry_after) == ("fast", 2.5)
    assert str(kind("plain")) == "plain"


@pytest.mark.parametrize("kind", OURS)
def test_each_can_be_raised_without_anything(kind):
    """Nothing is required: a bare error has empty facts, not missing ones."""
    error = kind()
    assert (str(error), error.client, error.retry_after, error.attempts) == ("", None, None, ())


def test_a_refusal_is_told_from_a_failure_by_its_class():
    """`except CallRejectedError` means: nothing was sent (section 2)."""
    refusals = {each.__name__ for each in OURS if issubclass(each, CallRejectedError)}
    assert refusals == {
        "CallRejectedError",
        "CircuitOpenError",
        "ThrottledError",
        "LimitExceededError",
        "BudgetExceededError",
        "ClientClosedError",
    }


def test_all_targets_failed_keeps_its_errors_in_order():
    """One error per target, whatever they were given as."""
    one, two = dspy.LMServerError("a"), CircuitOpenError("b")
    error = AllTargetsFailedError("none", errors=iter([one, two]))
    assert error.errors == (one, two)
