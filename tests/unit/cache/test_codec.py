"""Answers as JSON: they come back as they were, or they are refused."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from dspy import lm15
from hypothesis import given
from hypothesis import strategies as st
from litellm import ModelResponse, TextCompletionResponse
from litellm.types.llms.openai import ResponsesAPIResponse

from dspy_resilient.cache import Answer
from dspy_resilient.cache.codec import Attributes, decode, encode


def answer(text="Paris", **record):
    return Answer.of([text], {"response": None, "model": "m", "cost": 0.5, **record})


def there_and_back(kept):
    return decode(encode(kept, 0.0))[0]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CHAT = ModelResponse(
    model="m",
    choices=[
        {
            "finish_reason": "tool_calls",
            "message": {"role": "assistant", "content": "Zürich", "tool_calls": [CALL]},
            "logprobs": {
                "content": [
                    {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []},
                ]
            },
        }
    ],
    usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
)
TEXT = TextCompletionResponse(
    model="m", choices=[{"text": "Paris", "finish_reason": "stop"}], usage={"total_tokens": 3}
)
RESPONSES = ResponsesAPIResponse(
    id="r",
    created_at=1,
    model="m",
    status="completed",
    output=[
        {
            "id": "o",
            "status": "completed",
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Paris", "annotations": []}],
        }
    ],
    usage={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
)
TYPED = lm15.Response(
    "r",
    "m",
    lm15.Message(
        role="assistant",
        parts=(
            lm15.ThinkingPart("hm", lm15.ContinuationState("openai", "reasoning", {"id": [1]})),
            lm15.TextPart("Paris"),
            lm15.ToolCallPart("1", "f", {"$": "tuple", "deep": [{"x": None}]}),
            lm15.CitationPart(url="https://x", title="t"),
            lm15.DataPart({"a": [1, 2.5, True]}),
        ),
    ),
    "stop",
    lm15.Usage(input_tokens=3, output_tokens=4),
    logprobs=(lm15.TokenLogprob("a", -0.5, (97,), 5, (lm15.TopLogprob("b", -1.0),)),),
    provider_data={"raw": {"x": 1}},
    adaptations=(lm15.Adaptation("config.seed", "dropped", "no seed", asked=7),),
)


@pytest.mark.parametrize(
    "response",
    [CHAT, TEXT, RESPONSES, TYPED, (TYPED, TYPED), {"$": "odd", "choices": []}, None],
    ids=["chat", "text", "responses", "typed", "several", "dict", "none"],
)
def test_response_comes_back_as_it_was(response):
    """Class, fields and nested objects survive; litellm's private notes do not."""
    found = there_and_back(answer(response=response, cost_details={"kind": "list", "x": 1.5}))
    assert type(found.record["response"]) is type(response)
    assert _public(found.record["response"]) == _public(response)
    assert found.record["cost_details"] == {"kind": "list", "x": 1.5}
    assert found.outputs == ["Paris"]
    assert found.cost == 0.5
    assert found.replayed_record()["usage"] == {}


def _public(response):
    return response.model_dump() if hasattr(response, "model_dump") else response


def test_fields_of_a_restored_response_read_as_before():
    """Tools read `.choices`, `.usage` and `.cache_hit` of a response in history."""
    found = there_and_back(answer(response=CHAT))
    restored = found.record["response"]
    assert restored.choices[0].message.tool_calls[0].function.name == "f"
    assert restored.choices[0].logprobs.content[0].token == "a"
    assert restored.usage.total_tokens == 3
    assert restored.model == "m"
    marked = found.replayed_record()["response"]
    assert (marked.cache_hit, marked.usage) == (True, {})
    assert not hasattr(restored.choices[0].message, "reasoning_content")


def test_response_of_a_class_that_is_not_loaded_reads_the_same():
    """Without litellm in the process its objects come back as dicts with attributes."""
    text = encode(answer(response=CHAT), 0.0).replace(b"litellm.types.", b"litellm.not_loaded.")
    restored = decode(text)[0]
    response = restored.record["response"]
    assert isinstance(response, Attributes)
    assert response.choices[0].message.tool_calls[0]["function"].name == "f"
    assert response.choices[0]["message"].content == "Zürich"
    assert dict(response.usage)["total_tokens"] == 3
    assert response.model_dump()["choices"][0]["finish_reason"] == "tool_calls"
    marked = restored.replayed_record()["response"]
    assert (marked.cache_hit, marked.usage, marked.model) == (True, {}, "m")
    assert response.usage.total_tokens == 3
    response.note = "a field like any other"
    assert response["note"] == "a field like any other"
    with pytest.raises(AttributeError):
        response.cache_hit  # noqa: B018  # reading it is the test


@pytest.mark.parametrize(
    "outputs",
    [
        ["one", "two"],
        [{"text": None, "tool_calls": CHAT.choices[0].message.tool_calls}],
        [{"text": "x", "tool_calls": [Attributes(CALL)], "logprobs": CHAT.choices[0].logprobs}],
        [{"text": "x", "citations": [{"url": "u"}]}],
        TYPED,
    ],
    ids=["texts", "objects", "attributes", "citations", "typed"],
)
def test_outputs_of_every_shape_come_back(outputs):
    """Text, several candidates, and dicts with tool calls as objects or as dicts."""
    assert there_and_back(Answer.of(outputs, None)).fresh_outputs() == outputs


def test_outputs_in_history_come_back_beside_a_typed_response():
    """History keeps DSPy's own shape of the outputs."""
    found = there_and_back(Answer.of(TYPED, {"response": TYPED, "outputs": ["Paris"]}))
    assert found.replayed_record()["outputs"] == ["Paris"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.just("$"), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$", "of", "class"]), inner).map(Attributes)
    ),
    max_leaves=10,
)


@given(JSON, st.text(), st.integers(0, 10**9), st.floats(-1e12, 1e12))
def test_every_json_value_comes_back_with_its_types(value, target, tokens, stored):
    """Encoding and decoding change nothing, whatever the text, the keys and the types."""
    before = Answer([value], {"response": value}, target, tokens=tokens)
    after, when = decode(encode(before, stored))
    assert (after, when) == (before, stored)
    assert repr(after) == repr(before)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        threading.Lock(),
        SimpleNamespace(choices=[]),
        float("nan"),
        float("inf"),
        b"bytes",
        {"set"},
        {1: "a"},
        Path("x"),
        2**64,
    ],
    ids=["object", "lock", "namespace", "nan", "inf", "bytes", "set", "key", "path", "huge"],
)
def test_what_json_cannot_hold_is_refused(value):
    """Rather no entry than a wrong one."""
    with pytest.raises((TypeError, ValueError)):
        encode(answer(response={"x": value}), 0.0)


def test_endless_value_is_refused():
    """A cycle, or nesting without end, is not followed."""
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="deep"):
        encode(Answer(loop, None), 0.0)


def test_no_pickle_and_no_prompt_in_an_entry():
    """An entry is JSON text that a person can read."""
    text = encode(answer("Zürich", prompt="the question", messages=["the question"]), 0.0)
    assert json.loads(text)["outputs"] == ["Zürich"]
    assert b"the question" not in text
