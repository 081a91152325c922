"""What is kept of an answer, what of it is handed out, and which answers are fit to be stored."""

import copy
import threading
from types import SimpleNamespace

import pytest
from dspy import lm15
from litellm import ModelResponse, TextCompletionResponse
from litellm.types.llms.openai import ResponsesAPIResponse

from dspy_resilient.cache import Answer, usable

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
CALL_FUNCTION = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(content="Paris", finish_reason="stop", n=1, **message):
    message = {"role": "assistant", "content": content, **message}
    choice = {"finish_reason": finish_reason, "message": message}
    return ModelResponse(model="m", choices=[choice] * n, usage=USAGE)


def text(content="Paris", finish_reason="stop"):
    return TextCompletionResponse(
        model="m", choices=[{"text": content, "finish_reason": finish_reason}], usage=USAGE
    )


def responses(*output, status="completed", **fields):
    return ResponsesAPIResponse(
        id="r", created_at=1, model="m", status=status, output=list(output), **fields
    )


def message(content="Paris", kind="output_text"):
    part = {"type": kind, "text" if kind == "output_text" else "refusal": content}
    return {"type": "message", "role": "assistant", "content": [{**part, "annotations": []}]}


def typed(*parts, finish_reason="stop"):
    said = lm15.Message(role="assistant", parts=parts or (lm15.TextPart("Paris"),))
    usage = lm15.Usage(input_tokens=3, output_tokens=4)
    return lm15.Response("r", "m", said, finish_reason, usage)


def entry(response, outputs, **fields):
    return {
        "prompt": "the question",
        "messages": [{"role": "user", "content": "the question"}],
        "kwargs": {"temperature": 0.5},
        "response": response,
        "outputs": outputs,
        "usage": USAGE,
        "cost": 0.25,
        "timestamp": "now",
        "uuid": "u",
        "model": "openai/m",
        "response_model": "m",
        "model_type": "chat",
        **fields,
    }


def answer(response, outputs=None):
    outputs = ["Paris"] if outputs is None else outputs
    return Answer.of(outputs, entry(response, outputs), target="openai/m")


def test_no_prompt_is_kept():
    """What belongs to one call stays with that call."""
    kept = answer(chat())
    assert set(kept.record) == {"response", "cost", "model", "response_model", "model_type"}
    assert "the question" not in repr(kept)


def test_hit_is_replayed_as_dspy_does():
    """The same outputs, no usage, the old cost, and the response marked."""
    response = chat()
    record = answer(response).replayed_record()
    assert record["outputs"] == ["Paris"]
    assert (record["usage"], record["cost"], record["cache_hit"]) == ({}, 0.25, True)
    assert (record["model"], record["response_model"]) == ("openai/m", "m")
    assert record["response"].cache_hit is True
    assert record["response"].usage == {}
    assert record["response"].choices[0].message.content == "Paris"
    assert isinstance(record["response"], ModelResponse)


@pytest.mark.parametrize(
    "response",
    [chat(), text(), responses(message()), {"choices": [], "usage": USAGE}],
    ids=["chat", "text", "responses", "dict"],
)
def test_mark_does_not_touch_what_is_stored(response):
    """The marked response is a copy; the stored one can be replayed again and again."""
    before = copy.deepcopy(response)
    kept = answer(response)
    marked = kept.replayed_record()["response"]
    assert marked is not response
    assert response == before
    read = marked.get if isinstance(marked, dict) else lambda name: getattr(marked, name)
    assert (read("usage"), read("cache_hit")) == ({}, True)


@pytest.mark.parametrize(
    "response", [typed(), (typed(), typed()), None, 5], ids=["typed", "several", "none", "number"]
)
def test_response_that_takes_no_mark_is_replayed_as_it_is(response):
    """A frozen response has no place for a mark; DSPy replays it unmarked, too."""
    assert answer(response).replayed_record()["response"] is response


def test_answer_without_history_is_replayed_without():
    """With history switched off, outputs are all there is."""
    kept = Answer.of(["Paris"], None)
    assert kept.replayed_record() is None
    assert kept.fresh_outputs() == ["Paris"]
    assert usable(kept) is None


def test_outputs_handed_out_are_fresh():
    """A caller may do with its outputs what it likes."""
    outputs = [{"text": "Paris", "tool_calls": [copy.deepcopy(CALL_FUNCTION)]}]
    kept = answer(chat(), outputs)
    for mine in (outputs, kept.fresh_outputs(), kept.replayed_record()["outputs"]):
        mine[0]["tool_calls"][0]["function"]["name"] = "changed"
        mine.append("more")
    assert kept.fresh_outputs() == [{"text": "Paris", "tool_calls": [CALL_FUNCTION]}]


def test_typed_response_is_handed_out_as_it_is():
    """A typed response is frozen: a copy would be of no use."""
    response = typed()
    outputs = ["Paris"]
    kept = Answer.of(response, entry(response, outputs))
    assert kept.fresh_outputs() is response
    for mine in (outputs, kept.replayed_record()["outputs"]):
        mine.append("more")
    assert kept.replayed_record()["outputs"] == ["Paris"]


def test_outputs_that_cannot_be_copied_do_not_fail_the_call():
    """What a custom engine returns is handed on, copied or not."""
    outputs = [{"text": "Paris", "lock": threading.Lock()}]
    assert answer(None, outputs).fresh_outputs() == outputs


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (USAGE, 7),
        ({"prompt_tokens": 3, "completion_tokens": 4}, 7),
        ({"input_tokens": 3, "output_tokens": 4}, 7),
        ({"total_tokens": "many"}, 0),
        ({}, 0),
        (None, 0),
        (SimpleNamespace(total_tokens=9), 9),
    ],
    ids=["total", "chat", "responses", "nonsense", "empty", "none", "object"],
)
def test_answer_knows_what_it_saves(usage, tokens):
    """Tokens and cost are known at creation, for the numbers of what hits save."""
    kept = Answer.of(["Paris"], entry(None, None, usage=usage))
    assert (kept.tokens, kept.cost) == (tokens, 0.25)
    assert Answer.of(["Paris"], entry(None, None, cost=None)).cost is None
    assert Answer.of(typed(), None).tokens == 7


CALLED = [{"text": None, "tool_calls": [CALL_FUNCTION]}]
THOUGHT = [{"text": "", "reasoning_content": "hm"}]
PARTS = {"call": lm15.ToolCallPart("1", "f", {}), "thought": lm15.ThinkingPart("hm")}
CUT = {"incomplete_details": {"reason": "max_output_tokens"}}
STOPPED = {"incomplete_details": {"reason": "content_filter"}}


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (answer(chat()), None),
        (answer(chat(finish_reason="tool_calls"), CALLED), None),
        (answer(chat(n=2), ["Paris", "Rome"]), None),
        (answer(chat(finish_reason="length")), "truncated"),
        (answer(chat(finish_reason="content_filter")), "filtered"),
        (answer(chat(refusal="no"), [None]), "filtered"),
        (answer(chat(None), [None]), "empty"),
        (answer(chat(" \n"), [" \n"]), "empty"),
        (answer(chat(n=2), ["Paris", ""]), "empty"),
        (answer(chat(""), THOUGHT), "empty"),
        (answer(chat(n=0), []), "empty"),
        (answer({"choices": [{"finish_reason": "length"}]}), "truncated"),
        (answer({"choices": [{"finish_reason": "error"}]}), "error"),
        (answer(text()), None),
        (answer(text(finish_reason="length")), "truncated"),
        (answer(text(""), [""]), "empty"),
        (answer(responses(message())), None),
        (answer(responses(message(), status="incomplete", **CUT)), "truncated"),
        (answer(responses(message(), status="incomplete", **STOPPED)), "filtered"),
        (answer(responses(message(), status="incomplete")), "partial"),
        (answer(responses(message(), status="in_progress")), "partial"),
        (answer(responses(message(), status="failed")), "error"),
        (answer(responses(error={"code": "server_error"})), "error"),
        (answer(responses(message("no", "refusal")), [{"text": None}]), "filtered"),
        (answer(responses(), [{"text": None}]), "empty"),
        (Answer.of(typed(), None), None),
        (Answer.of(typed(PARTS["call"], finish_reason="tool_call"), None), None),
        (Answer.of(typed(finish_reason="length"), None), "truncated"),
        (Answer.of(typed(finish_reason="content_filter"), None), "filtered"),
        (Answer.of(typed(finish_reason="error"), None), "error"),
        (Answer.of(typed(lm15.RefusalPart("no")), None), "filtered"),
        (Answer.of(typed(PARTS["thought"]), None), "empty"),
        (Answer.of(typed(lm15.TextPart("")), None), "empty"),
        (answer((typed(), typed(finish_reason="length"))), "truncated"),
        (Answer.of([""], None), "empty"),
        (Answer.of(None, None), "empty"),
    ],
)
def test_only_complete_and_usable_answers_are_fit_to_be_stored(kept, reason):
    """Truncated, filtered, empty, partial and failed answers are not replayed for ever."""
    assert usable(kept) == reason
