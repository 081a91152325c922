"""The local provider as LiteLLM and the openai package see it: every dialect, every fault."""

from __future__ import annotations

import functools
from importlib.metadata import version

import litellm
import openai
import pytest

from dspy_resilient.testing import (
    BadChunk,
    Close,
    CutStream,
    Empty,
    EmptyText,
    Filtered,
    Garbage,
    Hang,
    NoChoices,
    Provider,
    Reset,
    StallStream,
    Status,
    Truncated,
    content_refused,
    context_too_long,
    cut_json,
    overloaded,
    quota_exceeded,
    rate_limited,
)

pytestmark = [
    pytest.mark.usefixtures("on_a_loop"),  # closes LiteLLM's clients in the end
    # Not ours to mend: what LiteLLM's types say on first use of a provider.
    pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier:UserWarning"),
]

LITELLM = tuple(map(int, version("litellm").split(".")[:2]))
HELLO = [{"role": "user", "content": "hello big world"}]
SAID = "one two three four"
MODELS = [
    "openai/gpt-4o-mini",
    "anthropic/claude-haiku-4-5",
    "gemini/gemini-2.0-flash",
    "groq/openai/gpt-oss-20b",
    "azure/gpt-x",
    "hosted_vllm/m",
    "openrouter/openai/m",
    "ollama_chat/m",
]
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def provider():
    with Provider(SAID) as running:
        yield running


def sync_complete(provider, model, **more):
    """One request through `litellm.completion`."""
    return litellm.completion(model, **options(provider, model, **more))


@pytest.fixture
def async_complete(provider, on_a_loop):
    """The same through `acompletion`."""

    def complete(model, **more):
        return on_a_loop(litellm.acompletion(model, **options(provider, model, **more)))

    return complete


@pytest.fixture(params=["sync", "async"])
def complete(request, provider, async_complete):
    return functools.partial(sync_complete, provider) if request.param == "sync" else async_complete


def options(provider, model, **more):
    base = provider.base(model.partition("/")[0])
    once = {"num_retries": 0, "max_retries": 0, "timeout": 10, "api_key": "dummy"}
    more = {"messages": HELLO, "api_base": base, **once, **more}
    return more if not model.startswith("azure") else {**more, "api_version": "2024-10-21"}


def streamed(provider, model, **more):
    chunks = sync_complete(provider, model, stream=True, **more)
    return [chunk.choices[0] for chunk in chunks if chunk.choices]


@pytest.mark.parametrize("model", [*MODELS, "cohere/m"])
def test_every_dialect_is_understood(provider, complete, model):
    """Text, finish reason, model and usage arrive through LiteLLM's route."""
    answer = complete(model)
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)


@pytest.mark.parametrize("model", MODELS)
def test_every_dialect_streams(provider, model):
    """The words arrive one by one, with a finish reason at the end."""
    choices = streamed(provider, model)
    words = [choice.delta.content for choice in choices if choice.delta.content]
    assert words == ["one ", "two ", "three ", "four"]
    assert choices[-1].finish_reason == "stop"


@pytest.mark.parametrize("model", [*MODELS[:3], "groq/openai/gpt-oss-20b", "ollama_chat/m"])
def test_tool_calls_reach_the_caller(provider, complete, model):
    """An answer function may call tools in any chat dialect."""
    provider.answer = {"tool_calls": [CALL]}
    (call,) = complete(model, tools=[TOOL]).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert call.function.arguments.replace(" ", "") == '{"city":"Rome"}'


@pytest.mark.parametrize("model", MODELS[:3])
def test_tool_calls_stream(provider, model):
    """Streamed tool calls are put together by LiteLLM."""
    provider.answer = {"tool_calls": [CALL]}
    deltas = [choice.delta for choice in streamed(provider, model, tools=[TOOL])]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    assert "".join(piece.function.name or "" for piece in pieces) == "weather"
    arguments = "".join(piece.function.arguments or "" for piece in pieces)
    assert arguments.replace(" ", "") == '{"city":"Rome"}'


@pytest.mark.parametrize("model", MODELS[:3])
def test_reasoning_is_kept_apart_from_text(provider, complete, model):
    """Thoughts arrive as reasoning_content."""
    provider.answer = {"text": "Rome", "reasoning": "capital of Italy"}
    message = complete(model).choices[0].message
    assert (message.content, message.reasoning_content) == ("Rome", "capital of Italy")


def test_the_other_openai_endpoints_are_served(provider):
    """Text completions, responses and embeddings."""
    to = {"api_base": provider.api_base, "api_key": "dummy"}
    text = litellm.text_completion(
        model="text-completion-openai/gpt-3.5-turbo-instruct", prompt="hello", **to
    )
    assert text.choices[0].text == SAID
    answer = litellm.responses(model="openai/gpt-4o-mini", input="hello", **to)
    assert answer.output[0].content[0].text == SAID
    vectors = litellm.embedding("openai/text-embedding-3-small", input=["a", "b", "a"], **to).data
    first, second, third = (vector["embedding"] for vector in vectors)
    assert first == third != second
    assert [request.path for request in provider.requests] == [
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
    ]


def test_ollama_generate_is_served(provider):
    """The older of Ollama's two formats."""
    answer = litellm.completion("ollama/m", messages=HELLO, api_base=provider.base("ollama"))
    assert answer.choices[0].message.content == SAID


# --- faults

MAPPED = [
    (Status(500), "InternalServerError", 500),
    (Status(502), "BadGatewayError", 502),
    (Status(503), "ServiceUnavailableError", 503),
    (Status(504), "Timeout", 504),
    (rate_limited(7), "RateLimitError", 429),
    (quota_exceeded(), "RateLimitError", 429),
    (quota_exceeded(400), "BadRequestError", 400),
    (context_too_long(), "ContextWindowExceededError", 400),
    (Status(400), "BadRequestError", 400),
    (Status(401), "AuthenticationError", 401),
    (Status(404), "NotFoundError", 404),
    (Status(408), "Timeout", 408),
    (Status(422), "BadRequestError", 422),
    (Reset(), "InternalServerError", 500),
    (Close(), "InternalServerError", 500),
    (CutStream(), "InternalServerError", 500),
    (CutStream(how="reset"), "InternalServerError", 500),
]
REFUSED = "ContentPolicyViolationError"
OPENAI_ONLY = [
    (content_refused(), "BadRequestError" if LITELLM >= (1, 110) else REFUSED, 400),
    (overloaded(), "APIError", 529),
    (quota_exceeded(402), "APIError", 402),
    (Status(403), "APIError", 403),
    (Garbage(), "InternalServerError", 500),
    (cut_json(), "InternalServerError", 500),
    (Empty(), "InternalServerError", 500),
    (BadChunk(), "InternalServerError", 500),
]
ANTHROPIC_ONLY = [
    (content_refused(), REFUSED, 400),
    (overloaded(), "InternalServerError", 500),
    (quota_exceeded(402), "PaymentRequiredError", 402),
    (Status(403), "PermissionDeniedError", 403),
    (Garbage(), "APIConnectionError", 500),
    (cut_json(), "APIConnectionError", 500),
    (Empty(), "APIConnectionError", 500),
    (BadChunk(), "APIConnectionError", 500),
]
TABLE = [("openai/gpt-4o-mini", *row) for row in [*MAPPED, *OPENAI_ONLY]]
TABLE += [("anthropic/claude-haiku-4-5", *row) for row in [*MAPPED, *ANTHROPIC_ONLY]]


def row_id(value):
    if isinstance(value, (str, int)):
        return None
    detail = (getattr(value, name, None) for name in ("code", "kind", "how"))
    return "-".join([type(value).__name__, *(str(part) for part in detail if part)])


ROWS = pytest.mark.parametrize(
    ("model", "fault", "error", "status"),
    TABLE,
    ids=[f"{row[0].split('/')[0]}-{i}-{row_id(row[1])}" for i, row in enumerate(TABLE)],
)


def check(complete, model, error, status):
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the class is what is compared
        complete(model)
    assert (type(caught.value).__name__, caught.value.status_code) == (error, status)


@ROWS
def test_a_fault_becomes_the_error_of_a_real_provider(provider, model, fault, error, status):
    """Each fault comes out of LiteLLM as the class and status measured for real providers."""
    provider.always(fault)
    check(functools.partial(sync_complete, provider), model, error, status)


@pytest.mark.parametrize(
    ("fault", "error", "status"),
    [MAPPED[0], MAPPED[4], MAPPED[14]],
    ids=["500", "429", "reset"],
)
@pytest.mark.parametrize("model", MODELS[:2])
def test_a_fault_is_the_same_error_in_async_calls(
    provider, async_complete, model, fault, error, status
):
    """Sync and async routes agree."""
    provider.always(fault)
    check(async_complete, model, error, status)


@pytest.mark.parametrize("model", MODELS[:4])
def test_retry_after_travels_with_the_error(provider, complete, model):
    """The header of a 429 is found where LiteLLM keeps it."""
    provider.always(rate_limited(retry_after=7))
    with pytest.raises(litellm.RateLimitError) as caught:
        complete(model)
    assert caught.value.litellm_response_headers["retry-after"] == "7"


def test_a_quota_error_names_the_quota(provider, complete):
    """Only the text tells a spent quota from a busy minute."""
    provider.always(quota_exceeded())
    with pytest.raises(litellm.RateLimitError, match="exceeded your current quota"):
        complete("openai/gpt-4o-mini")


@pytest.mark.parametrize("model", MODELS[:2])
@pytest.mark.parametrize("fault", [Hang(), StallStream()], ids=["hang", "stall"])
def test_a_silent_provider_times_out(provider, model, fault):
    """Whoever says nothing, from the start or in the middle, meets the caller's timeout."""
    provider.always(fault)
    with pytest.raises(litellm.Timeout):
        sync_complete(provider, model, timeout=0.2)


@pytest.mark.parametrize(
    ("fault", "text", "finish"),
    [
        (Truncated(), "one two ", "length"),
        (Filtered(), "", "content_filter"),
        (EmptyText(), "", "stop"),
    ],
    ids=["truncated", "filtered", "empty"],
)
@pytest.mark.parametrize("model", MODELS[:3])
def test_a_poor_answer_says_why(provider, model, fault, text, finish):
    """Truncated, filtered and empty answers are successes with a finish reason of their own."""
    provider.always(fault)
    choice = sync_complete(provider, model).choices[0]
    assert (choice.message.content or "", choice.finish_reason) == (text, finish)


def test_no_choices_are_no_error_for_litellm(provider, complete):
    """An empty list of choices passes LiteLLM unnoticed."""
    provider.always(NoChoices())
    assert complete("openai/gpt-4o-mini").choices == []


@pytest.mark.parametrize("model", MODELS[:2])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_cut_stream_fails_after_its_first_words(provider, model, how):
    """What was said before the cut has been seen by then."""
    provider.always(CutStream(2, how))
    with pytest.raises(litellm.exceptions.MidStreamFallbackError) as caught:
        streamed(provider, model)
    assert caught.value.generated_content == "one two "


def test_a_cleanly_ended_cut(provider):
    """LiteLLM invents a finish reason for a stream that just ends; from 1.110 on it is an error."""
    provider.always(CutStream(2, "eof"))
    if LITELLM >= (1, 110):
        with pytest.raises(litellm.exceptions.MidStreamFallbackError):
            streamed(provider, "openai/gpt-4o-mini")
        return
    choices = streamed(provider, "openai/gpt-4o-mini")
    assert [choice.delta.content for choice in choices[:2]] == ["one ", "two "]
    assert choices[-1].finish_reason == "stop"


def test_a_bad_chunk_breaks_an_openai_stream(provider):
    """Rubbish between good events is an error of the stream."""
    provider.always(BadChunk(2))
    with pytest.raises(litellm.exceptions.MidStreamFallbackError):
        streamed(provider, "openai/gpt-4o-mini")


# --- the openai package


def test_the_openai_client_understands_everything(provider):
    """Choices, log probabilities, usage, streams, responses and base64 embeddings."""
    with openai.OpenAI(base_url=provider.api_base, api_key="dummy", max_retries=0) as client:
        chat = client.chat.completions.create(model="m", messages=HELLO, n=2, logprobs=True)
        assert [choice.message.content for choice in chat.choices] == [SAID, SAID]
        tokens = [token.token for token in chat.choices[0].logprobs.content]
        assert "".join(tokens) == SAID
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *_, last = client.chat.completions.create(model="m", messages=HELLO, **options)
        assert last.usage.total_tokens == 7
        text = client.completions.create(model="m", prompt="hello", logprobs=1)
        assert "".join(text.choices[0].logprobs.tokens) == SAID
        assert client.responses.create(model="m", input="hello").output_text == SAID
        *_, end = client.responses.create(model="m", input="hello", stream=True)
        assert end.response.output_text == SAID
        vector = client.embeddings.create(model="m", input="hello", dimensions=4).data[0].embedding
        assert len(vector) == 4


def test_the_async_openai_client_streams(provider, on_a_loop):
    """The same over asyncio."""

    async def run():
        async with openai.AsyncOpenAI(base_url=provider.api_base, api_key="dummy") as client:
            stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
            return [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(on_a_loop(run())) == SAID
