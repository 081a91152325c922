"""Fallbacks kept for what a model refuses, and what a fallback takes away."""

from __future__ import annotations

import asyncio

import dspy
import pytest

from dspy_resilient import AllTargetsFailedError, ClientClosedError, ResilientLM
from dspy_resilient.events import FellBack
from dspy_resilient.testing import (
    Filtered,
    Hang,
    Provider,
    Status,
    content_refused,
    context_too_long,
)

KINDS = {
    "context_window_fallbacks": (context_too_long(), dspy.ContextWindowExceededError),
    "policy_fallbacks": (content_refused(), dspy.LMError),
}


@pytest.fixture
def second():
    """The provider of the fallbacks; it answers "Lyon"."""
    with Provider("Lyon") as running:
        yield running


@pytest.fixture
def other(second):
    """Build a model at the second provider."""

    def build(model="openai/second", **settings):
        return {"model": model, "api_base": second.api_base, "api_key": "k", **settings}

    return build


def models(provider):
    return [request.body["model"] for request in provider.requests]


@pytest.mark.parametrize("name", KINDS)
def test_what_a_model_refuses_goes_to_those_kept_for_it(provider, second, other, make, ask, name):
    """At once, with no second attempt; history names who answered, and the circuit stays closed."""
    events = []
    lm = make(**{name: [other()]}, fallbacks=["openai/not-asked"], on_event=events.append)
    provider.always(KINDS[name][0])
    assert ask(lm, "q") == ["Lyon"]
    assert (models(provider), models(second)) == (["test"], ["second"])
    entry = lm.history[-1]
    assert (entry["model"], entry["response"].model) == ("openai/second", "second")
    outcome = {"context_window_fallbacks": "context", "policy_fallbacks": "policy"}[name]
    assert [each.outcome for each in entry["attempts"]] == [outcome, "answer"]
    assert [each.target for each in events if isinstance(each, FellBack)] == [
        f"openai/second at {second.api_base}"
    ]
    assert lm.circuit.state == "closed"
    assert lm.circuit.failure_count == 0


@pytest.mark.parametrize("name", KINDS)
def test_without_such_a_list_the_error_leaves_unchanged(provider, make, ask, name):
    """No other fallback is asked: ReAct shortens its trajectory on exactly this error."""
    fault, kind = KINDS[name]
    (other_name,) = KINDS.keys() - {name}
    lm = make(fallbacks=["openai/b"], **{other_name: ["openai/c"]})
    provider.always(fault)
    with pytest.raises(kind) as caught:
        ask(lm, "q")
    assert provider.count == 1
    assert [each.outcome for each in caught.value.attempts] == [caught.value.verdict.kind]


@pytest.mark.parametrize("name", KINDS)
def test_if_nobody_in_the_list_answers_the_first_error_stands(
    provider, second, make, other, ask, name
):
    """Same class, same object; a note says how the others ended."""
    fault, kind = KINDS[name]
    lm = make(**{name: ["openai/b", "openai/c", other()]}, num_retries=0)
    provider.script(fault, fault, Status(500))
    second.down("reset")
    with pytest.raises(kind) as caught:
        ask(lm, "q")
    assert models(provider) == ["test", "b", "c"]
    assert len(caught.value.attempts) == 4
    assert caught.value.verdict.kind == caught.value.attempts[0].outcome
    assert any("AllTargetsFailedError" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("name", KINDS)
def test_a_list_goes_on_past_whoever_refuses_too(provider, make, second, other, ask, name):
    """In order; an outage in the list leads on as well."""
    fault, _ = KINDS[name]
    lm = make(**{name: ["openai/b", "openai/c", other()]}, num_retries=0)
    provider.script(fault, fault, Status(500))
    assert ask(lm, "q") == ["Lyon"]
    assert models(provider) == ["test", "b", "c"]


def test_a_fallback_whose_window_is_too_small_leads_to_the_list_too(provider, make, other, ask):
    """Whoever says it: an outage of the primary is no reason to lose the call."""
    lm = make(fallbacks=["openai/b"], context_window_fallbacks=[other()], num_retries=0)
    provider.script(Status(500), context_too_long())
    assert ask(lm, "q") == ["Lyon"]
    assert models(provider) == ["test", "b"]


def test_one_list_may_lead_to_the_other_but_each_is_asked_once(provider, make, ask):
    """No circle, whatever the models say."""
    lm = make(context_window_fallbacks=["openai/long"], policy_fallbacks=["openai/open"])
    provider.script(context_too_long(), content_refused(), context_too_long())
    with pytest.raises(dspy.ContextWindowExceededError):
        ask(lm, "q")
    assert models(provider) == ["test", "long", "open"]


def test_an_answer_that_a_filter_holds_back_is_asked_for_elsewhere(
    provider, second, other, make, ask
):
    """A filtered answer is no refusal, but nobody can use it."""
    lm = make(policy_fallbacks=["openai/b", other()])
    provider.always(Filtered())
    assert ask(lm, "q") == ["Lyon"]
    assert (models(provider), models(second)) == (["test", "b"], ["second"])
    assert ask(lm, "q") == ["Lyon"]  # kept under the key of whoever gave it
    assert (provider.count, second.count) == (4, 1)


def test_a_filtered_answer_stays_the_answer_if_nobody_does_better(provider, make, plain, ask):
    """As without the list: an answer, not an error; the last one, which history shows too."""
    provider.always(Filtered())
    lm = make(policy_fallbacks=["openai/b", "openai/c"], num_retries=0)
    expected = plain(cache=False)("q")
    provider.clear()
    provider.script(Filtered(), Filtered(), Status(500))
    assert ask(lm, "q") == expected
    assert models(provider) == ["test", "b", "c"]
    assert lm.history[-1]["model"] == "openai/b"


def test_a_hit_of_a_fallback_is_served_and_recorded_as_one(provider, second, other, make, ask):
    """Before an attempt on a fallback its own key is looked up; history says so."""
    lm = make(context_window_fallbacks=[other()])
    provider.always(context_too_long())
    ask(lm, "q")
    assert ask(lm, "q") == ["Lyon"]
    assert second.count == 1
    first, last = lm.history
    assert (first["model"], last["model"]) == ("openai/second", "openai/second")
    assert last["cache_hit"] is True
    assert last["usage"] == {}
    assert lm.stats().hits == 1


def test_a_fallback_refuses_what_its_own_circuit_refuses(provider, second, other, make, ask):
    """Circuits and rejections work in the lists as everywhere."""
    lm = make(context_window_fallbacks=[other(), "openai/b"], max_wait=0)
    lm.circuits[f"openai/second at {second.api_base}"].force_open()
    provider.script(context_too_long())
    assert ask(lm, "q") == ["Paris"]
    assert second.count == 0


def test_a_deadline_covers_the_lists_too(provider, second, other, make, ask):
    """What led there is raised when the time is up."""
    lm = make(context_window_fallbacks=[other(), "openai/never"], deadline=0.4)
    provider.script(context_too_long())
    second.always(Hang())
    with pytest.raises(dspy.ContextWindowExceededError) as caught:
        ask(lm, "q")
    assert [each.outcome for each in caught.value.attempts] == ["context", "timeout"]
    assert models(provider) == ["test"]


def test_a_copy_brings_its_settings_to_the_lists(provider, second, other, make, ask):
    """As to every target; history is the copy's own."""
    lm = make(context_window_fallbacks=[other(), "openai/b"]).copy(temperature=0.25)
    provider.script(context_too_long())
    second.always(context_too_long())
    ask(lm, "q")
    assert second.requests[-1].body["temperature"] == 0.25
    assert provider.requests[-1].body["temperature"] == 0.25
    assert [entry["model"] for entry in lm.history] == ["openai/b"]


def test_a_client_in_a_list_lends_its_fallbacks(provider, second, other, make, ask):
    """Flattened, as in `fallbacks`."""
    inner = ResilientLM("openai/inner", fallbacks=[other()], api_base=provider.api_base)
    lm = make(context_window_fallbacks=[inner], num_retries=0)
    provider.script(context_too_long(), Status(500))
    assert ask(lm, "q") == ["Lyon"]
    assert models(provider) == ["test", "inner"]


def test_a_client_that_answers_for_another_keeps_no_history_of_it(provider, make, ask):
    """The entry is where the call was made, whichever list led there."""
    lent = [ResilientLM(f"openai/{n}", api_base=provider.api_base, api_key="k") for n in "bc"]
    lm = make(fallbacks=[lent[0]], context_window_fallbacks=[lent[1]], num_retries=0)
    provider.script(Status(500), None, context_too_long())
    ask(lm, "q")
    ask(lm, "another")
    assert [entry["model"] for entry in lm.history] == ["openai/b", "openai/c"]
    assert [client.history for client in lent] == [[], []]


def test_react_still_shortens_its_trajectory(provider, make):
    """ReAct catches ContextWindowExceededError and tries again with less."""
    fields = ["next_thought", "next_tool_name", "next_tool_args", "reasoning", "answer"]
    values = ["think", "look", '{"query": "x"}', "because", "Paris"]
    provider.answer = "\n".join(
        f"[[ ## {field} ## ]]\n{value}" for field, value in zip(fields, values, strict=True)
    )
    lm = make(context_window_fallbacks=["openai/b"])
    provider.script(None, None, context_too_long(), context_too_long())

    def look(query: str) -> str:
        """Look something up."""
        return "nothing"

    with dspy.context(lm=lm):
        dspy.ReAct("question -> answer", tools=[look], max_iters=3)(question="q")
    sizes = [len(str(request.body["messages"])) for request in provider.requests]
    assert models(provider)[2:5] == ["test", "b", "test"]
    assert sizes[2] == sizes[3] > sizes[4]


async def test_a_stream_asks_the_list_before_its_first_chunk(provider, second, other, make):
    """Nothing was shown yet."""
    second.answer = "[[ ## answer ## ]]\none two three\n\n[[ ## completed ## ]]"
    lm = make(context_window_fallbacks=[other()])
    provider.script(context_too_long())
    program = dspy.streamify(dspy.Predict("question -> answer"), is_async_program=True)
    with dspy.context(lm=lm):
        values = [value async for value in program(question="q")]
    assert len(values) > 3
    assert values[-1].answer == "one two three"


async def test_identical_calls_share_what_the_list_answers(provider, second, other, make):
    """Followers get the answer of whoever gave it."""
    lm = make(context_window_fallbacks=[other()])
    provider.always(context_too_long())
    answers = await asyncio.gather(*(lm.acall("q") for _ in range(8)))
    assert answers == [["Lyon"]] * 8
    assert (provider.count, second.count) == (1, 1)


CAPABILITIES = {
    "supports_function_calling": "openai/gpt-3.5-turbo-instruct",
    "supports_response_schema": "openai/gpt-3.5-turbo",
    "supports_reasoning": "openai/gpt-4o",
}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_what_a_fallback_cannot_do_is_not_used_and_logged_once(name, caplog):
    """Capabilities are the intersection, whatever is asked when."""
    able, unable = "openai/gpt-5", CAPABILITIES[name]
    assert getattr(ResilientLM(able, fallbacks=["openai/o3"]), name) is True
    assert not caplog.records
    lm = ResilientLM(able, fallbacks=["openai/o3", unable], name="fast")
    assert not caplog.records  # only LiteLLM knows, and building a client does not import it
    for twin in (lm, lm, lm.copy(temperature=1.0)):
        assert getattr(twin, name) is False
    (record,) = caplog.records
    assert record.event == "dspy_resilient.capability_lost"
    assert all(each in record.getMessage() for each in (name, unable, "fast"))


def test_special_lists_take_no_capability_away():
    """They answer what nobody else would."""
    lm = ResilientLM("openai/gpt-5", context_window_fallbacks=["openai/gpt-3.5-turbo"])
    assert lm.supports_response_schema is True


def test_a_closed_client_is_no_fallback(provider, make):
    """It is refused where it is given, and by the name that its user knows."""
    closed = make("openai/closed", name="closed one")
    closed.close()
    with pytest.raises(ValueError, match=r"fallbacks.*'closed one' was closed"):
        make(fallbacks=[closed])


def test_a_fallback_that_is_closed_later_is_passed_over(provider, second, make, other, ask):
    """The next one answers; nothing is sent for a closed client, and copies still work."""
    closing = make("openai/closing", name="closing")
    lm = make(fallbacks=[closing, other()], num_retries=0)
    provider.always(Status(503))
    closing.close()
    assert ask(lm, "q") == ["Lyon"]
    assert ask(lm.copy(temperature=0.5), "q") == ["Lyon"]
    assert set(models(provider)) == {"test"}


def test_a_fallback_that_is_closed_later_is_named_if_nobody_answers(provider, make, ask):
    """Its error says that it is closed."""
    closing = make("openai/closing", name="closing")
    lm = make(fallbacks=[closing], num_retries=0)
    provider.always(Status(503))
    closing.close()
    with pytest.raises(AllTargetsFailedError) as caught:
        ask(lm, "q")
    assert isinstance(caught.value.errors[-1], ClientClosedError)
