"""A direct call of the LM: answer, request, history, usage, cost and errors are `dspy.LM`'s."""

from __future__ import annotations

import dspy
import pytest

from dspy_resilient.testing import (
    Filtered,
    Garbage,
    Reset,
    Status,
    Truncated,
    content_refused,
    context_too_long,
    quota_exceeded,
)

MODELS = [
    "openai/gpt-4o-mini",
    "anthropic/claude-haiku-4-5",
    "gemini/gemini-2.0-flash",
    "groq/openai/gpt-oss-20b",
    "hosted_vllm/m",
    "ollama_chat/m",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}},
}
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.7, "max_tokens": 50, "top_p": 0.9, "seed": 3, "stop": ["\n"]},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"50256": -100}, "user": "u"},
    {"extra_body": {"repetition_penalty": 1.1}},
    {"top_k": 5},
    {"min_p": 0.1, "my_own": {"deep": [1]}},
    {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    {"reasoning_effort": "low"},
    {"metadata": {"trace": "t-1"}},
    {"litellm_metadata": {"trace": "t-1"}},
    {"store": True, "service_tier": "flex", "prediction": {"type": "content", "content": "x"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": SCHEMA, "temperature": 0.0},
    {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
    {"logprobs": True, "top_logprobs": 2},
    {"n": 3, "temperature": 1.0},
    {"rollout_id": 7, "temperature": 1.0},
    {"rollout_id": None},
    {"headers": {"x-mine": "1"}, "extra_headers": {"x-more": "2"}},
    {"organization": "org"},
    {"timeout": 9},
    {"api_key": "another-key"},
    {"drop_params": True, "thinking": {"type": "enabled", "budget_tokens": 1024}},
    {"allowed_openai_params": ["top_k"], "top_k": 3},
    {"custom_llm_provider": "openai"},
    {"modalities": ["text"]},
    {"mock_response": "mocked"},
    {"max_completion_tokens": 30},
]


def _id(settings):
    return "+".join(settings)


def test_an_answer(compare, call):
    """Outputs, wire, history, usage, cost and callbacks are those of dspy.LM."""
    theirs, mine = compare(lambda lm: call(lm, "Capital of France?"))
    assert theirs.result == ["Paris"]
    assert theirs.history[0]["cost"] > 0
    assert mine.attempts == [1]


@pytest.mark.parametrize("model", MODELS)
def test_every_provider(compare, call, model):
    """Nothing of ours reaches any provider's wire, and its answer is read as by dspy.LM."""
    theirs, _ = compare(lambda lm: call(lm, "Capital of France?"), model=model)
    assert theirs.result == ["Paris"]


@pytest.mark.parametrize("model_type", ["chat", "text", "responses"])
def test_every_model_type(compare, call, model_type):
    """Chat, text completions and the Responses API."""
    theirs, _ = compare(
        lambda lm: call(lm, "Capital of France?"), model_type=model_type, use_developer_role=True
    )
    assert len(theirs.requests) == 1


@pytest.mark.parametrize("settings", SETTINGS, ids=_id)
def test_provider_settings_of_one_call(compare, call, settings):
    """Whatever a call may set goes where dspy.LM sends it, or fails as there."""
    compare(lambda lm: call(lm, "q", **settings), may_raise=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=_id)
def test_provider_settings_of_the_client(compare, call, settings):
    """Whatever the constructor takes goes where dspy.LM sends it, or fails as there."""
    compare(lambda lm: call(lm, "q"), may_raise=True, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3, "max_tokens": 9, "n": 2, "logprobs": 1},
        {"metadata": {"trace": "t-1"}, "extra_body": {"x": 1}},
        {"api_key": "another-key", "timeout": 9},
    ],
    ids=_id,
)
def test_settings_of_a_text_completion(compare, call, settings):
    """The same for `model_type="text"`."""
    compare(lambda lm: call(lm, "q", **settings), model_type="text")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3, "max_tokens": 900},
        {"metadata": {"trace": "t-1"}, "extra_body": {"x": 1}, "store": False},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"reasoning": {"effort": "low"}, "text": {"verbosity": "low"}},
        {"response_format": SCHEMA},
        {"api_key": "another-key", "timeout": 9},
    ],
    ids=_id,
)
def test_settings_of_a_response(compare, call, settings):
    """The same for `model_type="responses"`."""
    compare(lambda lm: call(lm, "q", **settings), model_type="responses", may_raise=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"metadata": {"user_id": "u"}},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 3000},
        {"cache_control_injection_points": [{"location": "message", "role": "system"}]},
        {"stop": ["x"], "top_k": 3, "extra_headers": {"anthropic-beta": "output-128k-2025-02-19"}},
    ],
    ids=_id,
)
def test_settings_of_an_anthropic_call(compare, call, settings):
    """The same over Anthropic's own protocol."""
    compare(lambda lm: call(lm, "q", **settings), model="anthropic/claude-haiku-4-5")


@pytest.mark.parametrize("model_type", ["chat", "responses"])
def test_tool_calls_and_thoughts(compare, call, model_type):
    """What an answer holds besides text is handed out in the same form."""
    answer = {
        "text": "see",
        "reasoning": "hm",
        "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}],
    }
    theirs, _ = compare(
        lambda lm: call(lm, "q", tools=[TOOL]), answer=answer, model_type=model_type
    )
    assert "tool_calls" in theirs.result[0]


@pytest.mark.parametrize("method", ["prompt", "messages", "both", "neither", "empty"])
@pytest.mark.filterwarnings("ignore:.*messages= :DeprecationWarning")
def test_every_way_to_ask(compare, call, method):
    """Prompt and messages, each and both; from DSPy 3.5 on it refuses messages."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "m"}]
    given = {
        "prompt": {"prompt": "p"},
        "messages": {"messages": messages},
        "both": {"prompt": "p", "messages": messages},
        "neither": {},
        "empty": {"prompt": "", "messages": []},
    }
    compare(lambda lm: call(lm, **given[method]), may_raise=hasattr(dspy.LM, "generate"))


@pytest.mark.parametrize(
    "fault",
    [
        Status(400),
        Status(401),
        Status(403),
        Status(404),
        Status(408),
        Status(413),
        Status(422),
        Status(500),
        Status(503),
        Status(529),
        context_too_long(),
        content_refused(),
        quota_exceeded(402),
        Reset(),
        Garbage(),
    ],
    ids=lambda fault: (
        f"{type(fault).__name__}{getattr(fault, 'code', '')}{getattr(fault, 'kind', '')}"
    ),
)
@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "anthropic/claude-haiku-4-5"])
def test_errors(compare, call, fault, model):
    """A provider's error is of the same class, with the same text, status and cause (section 2)."""
    theirs, mine = compare(
        lambda lm: call(lm, "q"), model=model, faults=[fault] * 3, num_retries=0, may_raise=True
    )
    assert theirs.error is not None
    assert len(mine.error.attempts) == 1


def test_a_rate_limit(compare, call):
    """The same LMRateLimitError, at once: without retries nothing is sent twice."""
    fault = Status(429, retry_after=3600)
    theirs, mine = compare(
        lambda lm: call(lm, "q"), faults=[fault], num_retries=0, raises=dspy.LMRateLimitError
    )
    assert theirs.error.retry_after in (None, pytest.approx(3600, abs=5))  # before LiteLLM 1.110
    assert mine.error.retry_after == pytest.approx(3600, abs=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": True, "temperature": 1.0},
        {"prompt": "\ud800"},
        {"prompt_cache": 1},
        {"response_format": 5},
        {"temperature": "hot"},
    ],
    ids=_id,
)
def test_what_dspy_refuses(compare, call, wrong):
    """What dspy.LM refuses before it sends anything is refused alike."""
    asked = {"prompt": "q", **wrong}
    compare(lambda lm: call(lm, **asked), may_raise=True, num_retries=0)


@pytest.mark.parametrize("fault", [Truncated(), Filtered()], ids=lambda f: type(f).__name__)
def test_answers_that_are_no_good(compare, call, fault, caplog):
    """A cut or filtered answer is handed out as it is, with DSPy's own remark in the log."""
    compare(lambda lm: call(lm, "q"), answer="one two three four", faults=[fault])
    said = [record.getMessage() for record in caplog.records if record.name == "dspy.clients.lm"]
    assert len(said) in (0, 2)
    assert len(set(said)) <= 1
