"""What a watched stream makes of the chunks that go by."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from dspy.clients.call_result import attributes
from dspy.clients.engines.streaming import EngineChunk

from dspy_resilient.pipeline.stream import WatchedStream


class Consumer:
    """Takes chunks, and has something of its own."""

    def __init__(self):
        self.taken = []
        self.capacity = 3

    async def send(self, item):
        self.taken.append(item)


def chunk(text=None, end=None, *, marked=True, provider="anthropic", api_base=None):
    choice = SimpleNamespace(finish_reason=end, delta=SimpleNamespace(content=text))
    origin = {"custom_llm_provider": provider, "api_base": api_base}
    if marked:
        origin["provider_response_model"] = "m"
    return SimpleNamespace(choices=[choice], _hidden_params=origin)


def watch(*chunks, **options):
    consumer = Consumer()
    stream = WatchedStream(consumer, **options)

    async def send():
        for each in chunks:
            await stream.send(each)

    asyncio.run(send())
    return stream, consumer.taken


@pytest.mark.parametrize("end", ["stop", "length", "tool_calls", "content_filter"])
def test_the_providers_own_end_is_whole(end):
    stream, taken = watch(chunk("one"), chunk(end=end))
    assert (stream.whole, stream.flaw, stream.emitted, len(taken)) == (True, None, True, 2)


@pytest.mark.parametrize("end", ["stop", "tool_calls"])
def test_a_made_up_end_after_the_providers_chunks_is_a_cut(end):
    stream, taken = watch(chunk("one"), chunk(end=end, marked=False))
    assert (stream.whole, len(taken)) == (False, 2)
    assert "cut" in stream.flaw


@pytest.mark.parametrize("end", ["length", "content_filter"])
def test_an_end_that_nobody_makes_up_came_from_the_provider(end):
    """But whether it is all is not known: it is not stored."""
    stream, _ = watch(chunk("one"), chunk(end=end, marked=False))
    assert (stream.whole, stream.flaw) == (False, None)


@pytest.mark.parametrize("provider", ["gemini", "mistral", "hosted_vllm", "openrouter", None])
def test_where_the_end_may_come_with_text_nobody_knows(provider):
    """No error without proof, and no place in the cache either."""
    chunks = chunk("one", provider=provider), chunk(end="stop", marked=False, provider=provider)
    stream, _ = watch(*chunks)
    assert (stream.whole, stream.flaw) == (False, None)


@pytest.mark.parametrize(
    ("api_base", "known"),
    [(None, True), ("https://api.openai.com/v1/", True), ("http://127.0.0.1:8000/v1", False)],
)
def test_openais_own_endpoint_is_known_and_other_servers_are_not(api_base, known):
    base = {"provider": "openai", "api_base": api_base}
    stream, _ = watch(chunk("one", **base), chunk(end="stop", marked=False, **base))
    assert (stream.flaw is not None) == known


def test_a_litellm_without_marks_proves_nothing():
    """Older ones have none: a stream of theirs is neither whole nor cut."""
    stream, _ = watch(chunk("one", marked=False), chunk(end="stop", marked=False))
    assert (stream.whole, stream.flaw) == (False, None)


def test_a_made_up_end_alone_is_kept_back():
    stream, taken = watch(chunk(end="stop", marked=False))
    assert (stream.emitted, taken, stream.whole) == (False, [], False)
    assert "without a single chunk" in stream.flaw


def test_an_answer_of_one_chunk_is_an_answer():
    for only in (chunk("Paris", "stop", marked=False), chunk(end="stop")):
        stream, taken = watch(only)
        assert (stream.emitted, taken, stream.flaw) == (True, [only], None)


def engine_chunk(text=None, end=None):
    """A chunk of DSPy's own class, whatever it is made of."""
    return EngineChunk(choices=[attributes({"delta": {"content": text}, "finish_reason": end})])


def test_the_end_in_a_chunk_of_another_class_is_not_known():
    """It may be LiteLLM's: no error without proof, and no place in the cache."""
    stream, taken = watch(engine_chunk("one"), engine_chunk(end="stop"))
    assert (stream.whole, stream.flaw, len(taken)) == (False, None, 2)


def test_where_no_end_is_made_up_it_is_known():
    """DSPy's native engine, and LiteLLM where it makes an error of a cut."""
    stream, taken = watch(engine_chunk("one"), engine_chunk(end="stop"), ends_truly=True)
    assert (stream.whole, stream.flaw, len(taken)) == (True, None, 2)


def test_an_end_alone_in_a_chunk_of_another_class_is_kept_back():
    """Of an empty body LiteLLM makes an answer; tool calls are an answer."""
    stream, taken = watch(engine_chunk(end="stop"))
    assert (taken, stream.emitted) == ([], False)
    assert "without a single chunk" in stream.flaw
    calls = engine_chunk(end="tool_calls")
    calls.choices[0].delta["tool_calls"] = [{"index": 0}]
    assert watch(calls)[1] == [calls]


def test_what_is_not_litellms_goes_by():
    """Whatever a program sends by itself."""
    things = ["status", SimpleNamespace(choices=[]), object()]
    stream, taken = watch(*things)
    assert (taken, stream.whole, stream.flaw) == (things, True, None)
    assert stream.capacity == 3


async def test_a_chunk_with_the_role_alone_leaves_the_attempt_free_to_be_repeated():
    """It goes on to the consumer, but says nothing yet; a chunk with text does."""
    from types import SimpleNamespace

    from dspy_resilient.pipeline.stream import WatchedStream

    class Consumer:
        got = 0

        async def send(self, item):
            self.got += 1

    def chunk(content):
        delta = SimpleNamespace(role="assistant", content=content)
        return SimpleNamespace(choices=[SimpleNamespace(finish_reason=None, delta=delta)])

    consumer = Consumer()
    stream = WatchedStream(consumer)
    await stream.send(chunk(None))
    assert (consumer.got, stream.emitted) == (1, False)
    await stream.send(chunk("Par"))
    assert (consumer.got, stream.emitted) == (2, True)
