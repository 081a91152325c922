"""What cannot be meant is refused when it is given, by name, value and what is allowed."""

from __future__ import annotations

import dataclasses
import inspect
import math
from decimal import Decimal
from pathlib import Path

import dspy
import pytest

from dspy_resilient import (
    CachePolicy,
    CircuitBreaker,
    CircuitPolicy,
    LimitPolicy,
    ResilientLM,
    RetryPolicy,
)

MODEL = "openai/test"
HUGE = 10**400
NO_NUMBER = ["5", b"5", [5], {}, Decimal(5), 5j, object(), True, False]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def refused(build, name, *, error=(TypeError, ValueError)):
    """Return the message with which `build` refuses, which has to name `name`."""
    with pytest.raises(error) as caught:
        build()
    message = str(caught.value)
    assert name in message
    return message


# The policies' numbers: (policy, field, smallest allowed, largest, whole, None allowed).
LEAST = math.ulp(0.0)
NUMBERS = [
    (CircuitPolicy, "failure_threshold", 1, None, True, False),
    (CircuitPolicy, "window", LEAST, None, False, False),
    (CircuitPolicy, "min_calls", 1, None, True, False),
    (CircuitPolicy, "failure_rate", 0.0, 1.0, False, True),
    (CircuitPolicy, "surprise", 0.0, 1.0, False, False),
    (CircuitPolicy, "slow_call", LEAST, None, False, True),
    (CircuitPolicy, "slow_rate", LEAST, 1.0, False, False),
    (CircuitPolicy, "recovery_time", LEAST, None, False, False),
    (CircuitPolicy, "backoff", 1.0, None, False, False),
    (CircuitPolicy, "max_recovery_time", LEAST, None, False, False),
    (CircuitPolicy, "jitter", 0.0, 0.99, False, False),
    (CachePolicy, "max_entries", 1, None, True, False),
    (CachePolicy, "max_bytes", 1, None, True, True),
    (CachePolicy, "ttl", LEAST, None, False, True),
    (CachePolicy, "coalesce_max_age", 0.0, None, False, False),
    (CachePolicy, "disk_bytes", 2**20, None, True, False),
    (RetryPolicy, "max_attempts", 1, None, True, False),
    (RetryPolicy, "base", 0.0, None, False, False),
    (RetryPolicy, "cap", 0.0, None, False, False),
    (RetryPolicy, "jitter", 0.0, 1.0, False, False),
    (LimitPolicy, "max_concurrent", 1, None, True, True),
    (LimitPolicy, "max_queue", 0, None, True, True),
    (LimitPolicy, "rpm", LEAST, None, False, True),
    (LimitPolicy, "tpm", LEAST, None, False, True),
    (LimitPolicy, "max_dollars", LEAST, None, False, True),
]
OTHERS = {
    (CircuitPolicy, "mode"),
    (CircuitPolicy, "listen"),
    (CachePolicy, "stale_if_error"),
    (CachePolicy, "store_if"),
    (CachePolicy, "disk"),
    (CachePolicy, "tenant"),
    (CachePolicy, "shared"),
    (LimitPolicy, "adaptive"),
    (LimitPolicy, "per"),
}
POLICIES = [CircuitPolicy, CachePolicy, RetryPolicy, LimitPolicy]


def test_every_field_of_every_policy_is_tried_here():
    """A new field comes with its range (section 2)."""
    fields = {(policy, f.name) for policy in POLICIES for f in dataclasses.fields(policy)}
    assert fields == {row[:2] for row in NUMBERS} | OTHERS


@pytest.mark.parametrize(
    ("policy", "name", "low", "high", "whole", "optional"),
    NUMBERS,
    ids=[f"{row[0].__name__}.{row[1]}" for row in NUMBERS],
)
def test_a_number_is_a_number_within_its_range(policy, name, low, high, whole, optional):
    """Field, value and range are in the message; the edges are in the range (section 2)."""

    def given(value):
        return lambda: policy(**{name: value})

    for value in [*NO_NUMBER, *([] if optional else [None]), *([1.0, 2.5] if whole else [])]:
        refused(given(value), f"{policy.__name__}: {name} must be ", error=TypeError)
    outside = [-1, *([] if whole else NOT_FINITE)]
    outside += [low - 1] if whole else [math.nextafter(low, -math.inf)]
    outside += [] if high is None else [math.nextafter(high, math.inf), 10**6]
    for value in outside:
        message = refused(given(value), f"{policy.__name__}: {name} must be ", error=ValueError)
        assert message.endswith(f"got {value!r}")
    for value in [low, *([] if high is None else [high]), *([None] if optional else [])]:
        assert getattr(policy(**{name: value}), name) == value


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_take_names_only_and_only_theirs(policy):
    """No argument by position, none that does not exist."""
    with pytest.raises(TypeError):
        policy(5)
    refused(lambda: policy(treshold=5), "treshold", error=TypeError)


@pytest.mark.parametrize(
    ("policy", "name", "value", "error"),
    [
        (CircuitPolicy, "mode", "off", ValueError),
        (CircuitPolicy, "mode", None, ValueError),
        (CircuitPolicy, "mode", [], ValueError),
        (CircuitPolicy, "listen", "all", ValueError),
        (CachePolicy, "shared", 1, ValueError),
        (CachePolicy, "shared", None, ValueError),
        (LimitPolicy, "adaptive", 1, ValueError),
        (LimitPolicy, "adaptive", None, ValueError),
        (LimitPolicy, "per", "week", ValueError),
        (CachePolicy, "store_if", "always", TypeError),
        (CachePolicy, "store_if", True, TypeError),
        (CachePolicy, "disk", 5, TypeError),
        (CachePolicy, "disk", False, TypeError),
        (CachePolicy, "disk", b"/tmp", TypeError),
        (CachePolicy, "disk", "", ValueError),
        (CachePolicy, "tenant", 5, TypeError),
        (CachePolicy, "tenant", "", ValueError),
        (CachePolicy, "stale_if_error", 0, ValueError),
        (CachePolicy, "stale_if_error", "9", TypeError),
        (CachePolicy, "stale_if_error", math.nan, ValueError),
    ],
)
def test_a_choice_is_one_of_those_there_are(policy, name, value, error):
    """What is allowed is in the message (section 2)."""
    refused(lambda: policy(**{name: value}), f"{policy.__name__}: {name} must be ", error=error)


def test_a_rule_that_nobody_awaits_is_refused():
    """A coroutine would count as a yes (section 2)."""

    async def rule(entry):
        return False

    refused(lambda: CachePolicy(store_if=rule), "store_if", error=TypeError)
    refused(lambda: ResilientLM(MODEL, on_event=rule), "on_event", error=TypeError)


def test_fields_that_contradict_each_other_are_refused():
    """Nothing is accepted and ignored (section 2)."""
    refused(lambda: CachePolicy(stale_if_error=60), "ttl", error=ValueError)


def test_a_folder_may_be_a_path(tmp_path):
    """A Path is a folder's name like any other, and equal to it."""
    assert CachePolicy(disk=tmp_path) == CachePolicy(disk=str(tmp_path))
    assert not isinstance(CachePolicy(disk=tmp_path).disk, Path)


def test_whole_numbers_have_no_largest():
    """A number that no float can hold is refused by name, or taken, and never breaks."""
    assert LimitPolicy(max_concurrent=HUGE).max_concurrent == HUGE
    refused(lambda: CircuitPolicy(failure_rate=HUGE), "failure_rate", error=ValueError)
    refused(lambda: RetryPolicy(base=HUGE), "base", error=ValueError)
    refused(lambda: ResilientLM("openai/x", deadline=HUGE), "deadline", error=ValueError)


def test_a_policy_can_be_varied_pasted_back_and_compared():
    """Options are values (section 2)."""
    for policy in POLICIES:
        assert policy() == policy()
        assert hash(policy()) == hash(policy())
        pasted = eval(repr(policy()), {policy.__name__: policy})
        assert pasted == policy()
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(policy(), dataclasses.fields(policy)[0].name, 1)
    assert dataclasses.replace(RetryPolicy(), base=0.0) == RetryPolicy(base=0.0)
    refused(lambda: dataclasses.replace(RetryPolicy(), base=-1), "base", error=ValueError)


# The constructor's own arguments.

LISTS = ["fallbacks", "context_window_fallbacks", "policy_fallbacks"]
WRONG = [
    *(("max_wait", value, TypeError) for value in ["15", None, True, [1], Decimal(1)]),
    *(("max_wait", value, ValueError) for value in [-1, -0.001, *NOT_FINITE]),
    *(("deadline", value, TypeError) for value in ["60", True, [1]]),
    *(("deadline", value, ValueError) for value in [0, 0.0, -1, *NOT_FINITE]),
    *(("num_retries", value, TypeError) for value in ["3", None, True, False, 3.0, math.nan]),
    ("num_retries", -1, ValueError),
    *(("limits", value, TypeError) for value in ["8", True, False, 8.0, RetryPolicy(), {}]),
    *(("limits", value, ValueError) for value in [0, -1]),
    *(("retry", value, TypeError) for value in [3, True, False, CircuitPolicy(), {}, "3"]),
    *(("circuit", value, TypeError) for value in [None, 5, "on", 1, 0, CachePolicy(), {}]),
    *(("cache", value, TypeError) for value in [None, 1, 0, "on", {}, CircuitPolicy()]),
    *(("name", value, TypeError) for value in [5, True, b"fast", ["fast"]]),
    ("name", "", ValueError),
    *(("on_event", value, TypeError) for value in [True, "print", [print], 1]),
    *((n, v, TypeError) for n in LISTS for v in ["openai/b", b"b", {"model": "b"}, 5, True]),
    *((n, v, TypeError) for n in LISTS for v in [{"openai/b"}, dspy.LM("openai/b"), [5], [{}]]),
    *((n, [""], ValueError) for n in LISTS),
    *(("fallback", [value], TypeError) for value in [5, None, True, b"b", ["openai/b"], print]),
    *(("fallback", [value], TypeError) for value in [{}, {"model": 5}, dspy.Predict("a -> b")]),
    ("fallback", [""], ValueError),
    *(("engine", value, (TypeError, ValueError)) for value in ["native", "", None, 5, object()]),
    *(("model", value, ValueError) for value in ["", "openai/", None, 5]),
]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    WRONG,
    ids=[f"{n}={repr(v).split(' at 0x')[0]:.30}" for n, v, _ in WRONG],
)
def test_an_argument_that_cannot_be_meant_is_refused_at_construction(name, value, error):
    """TypeError or ValueError naming the argument, never a surprise in the first call (section 2)."""
    argument = "fallbacks" if name == "fallback" else name
    refused(lambda: ResilientLM(**{"model": MODEL, argument: value}), name, error=error)


@pytest.mark.parametrize(("name", "value", "error"), [row for row in WRONG if row[0] == "max_wait"])
def test_what_a_copy_sets_for_itself_is_checked_too(name, value, error):
    """As at construction (section 2)."""
    refused(lambda: ResilientLM(MODEL).copy(**{name: value}), name, error=error)


def test_the_message_shows_value_and_range():
    """A person sees what was wrong and what would be right (section 2)."""
    with pytest.raises(ValueError, match="max_wait must be a number at least 0; got -1"):
        ResilientLM(MODEL, max_wait=-1)
    with pytest.raises(TypeError, match=r"limits must be a LimitPolicy, .* at least 1.*got 'many'"):
        ResilientLM(MODEL, limits="many")
    with pytest.raises(TypeError, match="must be True, False or a CircuitPolicy or a CircuitB"):
        ResilientLM(MODEL, circuit=5)


@pytest.mark.parametrize("name", ["cache", "circuit", "retry", "limits", "max_wait", "on_event"])
@pytest.mark.parametrize("wrong", ["sk-proj-0123456789abcdef", {"api_key": "sk-0123456789"}])
def test_a_misplaced_key_is_not_quoted(name, wrong):
    """A key that slipped into the wrong place is not in the error."""
    message = refused(lambda: ResilientLM(MODEL, **{name: wrong}), name, error=TypeError)
    assert "0123456789" not in message


def test_zero_none_and_false_mean_themselves():
    """Falsy values are answers, not absences (section 2)."""
    lm = ResilientLM(
        MODEL,
        max_wait=0,
        deadline=None,
        num_retries=0,
        circuit=False,
        cache=False,
        limits=None,
        fallbacks=None,
        context_window_fallbacks=None,
        policy_fallbacks=None,
        name=None,
        on_event=None,
        retry=None,
        temperature=0,
    )
    assert (lm.max_wait, lm.deadline, lm.num_retries, lm.cache) == (0, None, 0, False)
    assert (lm.circuit, lm.circuits, lm.name, lm.kwargs["temperature"]) == (None, {}, MODEL, 0)


def test_num_retries_and_retry_must_say_the_same():
    """Two answers to one question are refused; the same answer twice is fine (section 2)."""
    message = refused(
        lambda: ResilientLM(MODEL, num_retries=2, retry=RetryPolicy(max_attempts=4)),
        "num_retries",
        error=ValueError,
    )
    assert "2" in message
    assert "4" in message
    assert ResilientLM(MODEL, num_retries=3, retry=RetryPolicy(max_attempts=4)).num_retries == 3
    assert ResilientLM(MODEL, retry=RetryPolicy(max_attempts=2)).num_retries == 1


@pytest.mark.parametrize("stream", [True, 1, "yes"])
def test_stream_is_refused_wherever_it_is_given(stream):
    """stream=True would give a live stream in place of an answer."""
    for build in (
        lambda: ResilientLM(MODEL, stream=stream),
        lambda: ResilientLM(MODEL).copy(stream=stream),
        lambda: ResilientLM(MODEL)("q", stream=stream),
        lambda: ResilientLM(MODEL, fallbacks=[{"model": "openai/b", "stream": stream}]),
        lambda: ResilientLM(MODEL, fallbacks=[dspy.LM("openai/b", stream=stream)]),
    ):
        with pytest.raises(dspy.LMUnsupportedFeatureError, match="streamify"):
            build()


async def test_a_call_refuses_what_it_cannot_mean():
    """Per-call cache= and num_retries= are checked in both drivers."""
    lm = ResilientLM(MODEL)
    for options in ({"num_retries": -1}, {"cache": CachePolicy()}, {"num_retries": True}):
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            lm("q", **options)
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            await lm.acall("q", **options)


OURS = sorted(
    set(inspect.signature(ResilientLM).parameters)
    - set(inspect.signature(dspy.LM).parameters)
    - {"kwargs"}
)


@pytest.mark.parametrize("name", OURS)
async def test_an_argument_of_ours_is_never_forwarded(provider, make, name):
    """Neither a call nor a dict of dspy.LM arguments takes one for a provider's (section 2)."""
    lm = make()
    refused(lambda: lm("q", **{name: 5}), name, error=TypeError)
    with pytest.raises(TypeError, match=name):
        await lm.acall("q", **{name: 5})
    refused(lambda: make(fallbacks=[{"model": "openai/b", name: 5}]), name, error=TypeError)
    assert provider.count == 0


def known_elsewhere():
    """Every keyword that LiteLLM or the OpenAI SDK takes."""
    import litellm
    import openai
    from litellm.types import utils
    from openai.resources import Completions as Text
    from openai.resources.chat import Completions
    from openai.resources.responses import Responses

    functions = [
        *(litellm.completion, litellm.acompletion, litellm.text_completion, litellm.responses),
        *(Completions.create, Text.create, Responses.create, openai.OpenAI, openai.AsyncOpenAI),
    ]
    known = {name for each in functions for name in inspect.signature(each).parameters}
    known |= set(utils.all_litellm_params) | set(litellm.OPENAI_CHAT_COMPLETION_PARAMS)
    for model in ("gpt-4o", "claude-haiku-4-5", "gemini-2.5-flash"):
        known |= set(litellm.get_supported_openai_params(model) or ())
    return known


def test_no_argument_of_ours_has_a_name_that_litellm_or_a_provider_takes():
    """But `fallbacks` and `context_window_fallbacks`, which mean the same (section 2)."""
    planned = {"shared", "cache_policy"}
    known = known_elsewhere()
    assert len(known) > 100
    assert {*OURS, *planned} & known <= {"fallbacks", "context_window_fallbacks"}


def test_arguments_of_dspys_keep_their_order_and_defaults():
    """Positional arguments of dspy.LM mean the same here."""
    theirs = inspect.signature(dspy.LM).parameters
    ours = inspect.signature(ResilientLM).parameters
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in theirs if name != "kwargs"]
    changed = {name for name in positional if ours[name].default != theirs[name].default}
    assert changed <= {"num_retries", "engine"}
    assert ResilientLM(MODEL).num_retries == dspy.LM(MODEL).num_retries


# Fallbacks that lead nowhere new.


def test_the_same_target_twice_is_refused():
    """A chain that leads back is refused, and says to whom."""
    one = dspy.LM("openai/b")
    for fallbacks in (
        [MODEL],
        ["openai/b", "openai/b"],
        [one, one],
        [{"model": "openai/b"}, {"model": "openai/b"}],
        [ResilientLM("openai/b"), ResilientLM("openai/c", fallbacks=["openai/b"])],
    ):
        message = refused(
            lambda given=fallbacks: ResilientLM(MODEL, fallbacks=given),
            "fallbacks",
            error=ValueError,
        )
        assert "openai/" in message


@pytest.mark.parametrize("name", LISTS)
def test_a_chain_back_to_the_primary_is_refused(name):
    """A client whose fallback falls back to it is a cycle."""
    inner = ResilientLM("openai/b", fallbacks=[MODEL])
    for given in ([inner], [MODEL], ["openai/c", "openai/c"]):
        message = refused(lambda v=given: ResilientLM(MODEL, **{name: v}), name, error=ValueError)
        assert "openai/" in message


def test_a_model_may_be_in_several_lists():
    """Each list has an order of its own."""
    lm = ResilientLM(MODEL, **{name: ["openai/b"] for name in LISTS})
    assert len(lm.circuits) == 2


def test_the_same_model_elsewhere_or_with_another_key_is_another_target():
    """What differs in endpoint, credential or settings is no cycle."""
    fallbacks = [
        {"model": MODEL, "api_base": "http://127.0.0.1:9/v1"},
        {"model": MODEL, "api_key": "another"},
        dspy.LM(MODEL, temperature=0.5),
    ]
    assert len(ResilientLM(MODEL, fallbacks=fallbacks).circuits) >= 2


def test_what_a_fallback_cannot_take_is_refused_by_it():
    """dspy.LM's own checks apply to a dict (section 2)."""
    with pytest.raises(ValueError, match="engine"):
        ResilientLM(MODEL, fallbacks=[{"model": "openai/b", "engine": "native"}])


def test_a_shared_circuit_is_a_circuit_of_ours():
    """`circuit=` takes a CircuitBreaker of this package, not the one below it."""
    import circuitbreaker

    shared = CircuitBreaker(CircuitPolicy())
    assert ResilientLM(MODEL, circuit=shared).circuit is shared
    refused(
        lambda: ResilientLM(MODEL, circuit=circuitbreaker.CircuitBreaker()),
        "circuit",
        error=TypeError,
    )


# What LiteLLM's own `fallbacks` would do with strings is none of a provider's business.


def test_fallbacks_may_be_any_ordered_collection():
    """A list, a tuple, a generator."""
    names = ["openai/b", "openai/c"]
    for given in (names, tuple(names), iter(names), dict.fromkeys(names).keys()):
        assert len(ResilientLM(MODEL, fallbacks=given).circuits) == 3


def test_what_is_refused_has_changed_nothing():
    """A refused copy leaves the client as it was (section 2)."""
    lm = ResilientLM(MODEL, temperature=0.5)
    for wrong in ({"circuit": False}, {"max_wait": -1}, {"cache": "no"}, {"stream": True}):
        with pytest.raises((TypeError, ValueError, dspy.LMError)):
            lm.copy(temperature=1.0, **wrong)
    assert lm.kwargs["temperature"] == 0.5
    assert lm.cache is True


@pytest.mark.parametrize(
    "name",
    ["name", "circuit", "retry", "limits", "on_event", "cache_policy", *LISTS],
)
def test_a_copy_cannot_have_what_belongs_to_the_client(name):
    """What all copies share is refused by name, whatever the value."""
    lm = ResilientLM(MODEL)
    for value in (None, True, "x"):
        message = refused(lambda v=value: lm.copy(**{name: v}), name, error=TypeError)
        assert "copy" in message
