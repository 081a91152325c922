"""Streams, under the same page as every other call."""

from __future__ import annotations

import asyncio
import contextlib
from importlib.metadata import version

import anyio
import dspy
import pytest

from dspy_resilient import CircuitPolicy, DeadlineExceededError, RetryPolicy
from dspy_resilient.testing import (
    CutStream,
    Empty,
    Garbage,
    Hang,
    Hold,
    NoChoices,
    Provider,
    StallStream,
    Status,
    dspy_answers,
)

AT_ONCE = RetryPolicy(base=0.0)
LITELLM = tuple(map(int, version("litellm").split(".")[:2]))


@pytest.fixture
def provider():
    """A provider whose answers have a few chunks."""
    with Provider(dspy_answers(lambda question: "one two three four five")) as running:
        yield running


async def consume(lm, question="q", *, is_async=True, started=None, program=None):
    """Stream one prediction; return the chunks seen and the prediction."""
    program = program or dspy.Predict("question -> answer")
    chunks, prediction = 0, None
    with dspy.context(lm=lm):
        stream = dspy.streamify(program, is_async_program=is_async)
        output = stream(question=question)
        async for value in output:
            if isinstance(value, dspy.Prediction):
                prediction = value
            else:
                chunks += 1
                if started is not None:
                    started.set()
    return chunks, prediction


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_chunks_arrive_and_the_prediction_follows(provider, make, is_async):
    """Streaming works through both drivers; the answer is cached, and a hit has no chunks."""
    lm = make()
    chunks, prediction = await consume(lm, is_async=is_async)
    assert chunks > 3
    assert prediction.answer == "one two three four five"
    assert await consume(lm, is_async=is_async) == (0, prediction)
    assert provider.count == 1


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_before_the_first_chunk_a_failure_is_retried(provider, make, is_async):
    """Nothing was shown yet, so the request may be repeated."""
    provider.script(Status(500), Status(503))
    chunks, prediction = await consume(make(retry=AT_ONCE), is_async=is_async)
    assert chunks > 3
    assert prediction.answer.startswith("one")
    assert provider.count == 3


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_before_the_first_chunk_a_fallback_may_answer(provider, make, is_async):
    """The next target streams instead."""
    backup = dspy.LM("openai/backup", api_base=provider.api_base, api_key="k", engine="litellm")
    provider.script(Status(500))
    lm = make(num_retries=0, fallbacks=[backup])
    chunks, _ = await consume(lm, is_async=is_async)
    assert chunks > 3
    assert lm.history[-1]["model"] == "openai/backup"


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_after_the_first_chunk_nothing_is_replayed(provider, make, is_async):
    """A stream that breaks half-way is a failure, with no second try and no fallback."""
    backup = dspy.LM("openai/backup", api_base=provider.api_base, api_key="k", engine="litellm")
    lm = make(retry=AT_ONCE, fallbacks=[backup], circuit=CircuitPolicy(failure_threshold=1))
    provider.script(CutStream(3, how="reset"))
    with pytest.raises(dspy.LMError):
        await consume(lm, is_async=is_async)
    assert provider.count == 1
    assert lm.circuit.state == "open"


NOTHING = [CutStream(0, how="eof"), CutStream(0, how="close"), CutStream(0, how="reset")]
NOTHING += [Empty(), Garbage(), NoChoices()]


@pytest.mark.parametrize("fault", NOTHING, ids=repr)
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_a_stream_that_brings_nothing_is_a_failure_before_output(
    provider, make, is_async, fault
):
    """LiteLLM makes an answer of an empty body or a web page; here it is retried."""
    lm = make(retry=AT_ONCE)
    provider.script(fault)
    chunks, prediction = await consume(lm, is_async=is_async)
    assert chunks > 3
    assert prediction.answer.startswith("one")
    assert provider.count == 2
    assert [each.outcome for each in lm.history[-1]["attempts"]] == ["failure", "answer"]
    assert len(lm.history) == 1


@pytest.mark.parametrize("model", ["anthropic/claude-haiku-4-5", "azure/gpt-4o"])
@pytest.mark.parametrize("how", ["eof", "close", "reset"])
async def test_a_cut_stream_is_an_error_and_no_short_answer(provider, make, model, how):
    """Where LiteLLM lets the made-up end be told from the provider's; nothing is stored."""
    base = provider.base(model.partition("/")[0])
    options = {"api_version": "2024-06-01"} if model.startswith("azure") else {}
    lm = make(model, api_base=base, circuit=CircuitPolicy(failure_threshold=1), **options)
    chunks, prediction = await consume(lm)
    assert chunks > 3
    assert prediction.answer == "one two three four five"
    provider.script(CutStream(8, how=how))
    with pytest.raises(dspy.LMError):
        await consume(lm, "another")
    assert lm.circuit.state == "open"
    assert len(lm.history) == 1
    assert lm.stats().stored == 1


async def test_a_stream_without_its_end_is_not_remembered(provider, make):
    """Other servers may send the end along with the last words; before 1.110 LiteLLM hides it."""
    lm = make()
    provider.script(CutStream(3, how="eof"))
    notices = LITELLM >= (1, 110)
    with pytest.raises(dspy.LMServerError if notices else dspy.AdapterParseError):
        await consume(lm)
    assert lm.stats().stored == lm.stats().evicted == 0
    assert lm.stats().skipped.get("partial", 0) == (not notices)


class Typed(dspy.Module):
    """Asks with a typed request, and so streams chunks of DSPy's own class."""

    def _request(self, question):
        lm = dspy.settings.lm
        return lm, dspy.lm15.Request(model=lm.model, messages=(dspy.lm15.Message.user(question),))

    def forward(self, question):
        lm, request = self._request(question)
        return dspy.Prediction(answer=lm(request).message.text)

    async def aforward(self, question):
        lm, request = self._request(question)
        return dspy.Prediction(answer=(await lm.acall(request)).message.text)


MODELS = ["openai/m", "anthropic/claude-haiku-4-5", "gemini/gemini-2.0-flash", "groq/m"]
ENGINES = [(model, engine) for model in MODELS for engine in ("litellm", "auto", "lm15")]
PROGRAMS = {"ordinary": dspy.Predict("question -> answer"), "typed": Typed()}


@pytest.mark.parametrize("how", ["eof", "close"])
@pytest.mark.parametrize(("model", "engine"), [*ENGINES, ("mistral/m", "litellm")])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
async def test_half_an_answer_is_never_remembered(provider, make, program, model, engine, how):
    """Whoever made the chunks, a stream that was cut does not come again from the cache."""
    lm = make(model, api_base=provider.base(model.partition("/")[0]), engine=engine, num_retries=0)
    provider.script(CutStream(3, how=how))
    with contextlib.suppress(dspy.LMError, dspy.AdapterParseError):
        await consume(lm, program=program)
    assert lm.stats().stored == 0
    _, prediction = await consume(lm, program=program)
    assert "one two three four five" in prediction.answer
    assert lm.stats().hits == 0


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("engine", ["litellm", "lm15"])
async def test_a_typed_stream_that_ends_is_remembered(provider, make, engine, is_async):
    """Where it is sure that the end was the provider's; a plain typed call finds it, too."""
    lm = make(engine=engine)
    chunks, prediction = await consume(lm, is_async=is_async, program=Typed())
    assert chunks > 3
    known = engine == "lm15" or LITELLM >= (1, 110)
    assert lm.stats().stored == known
    with dspy.context(lm=lm):
        assert Typed()(question="q").answer == prediction.answer
    assert provider.count == 2 - known


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_a_consumer_that_goes_away_says_nothing_about_the_provider(provider, make, is_async):
    """Neutral, and everything is given back."""
    lm = make(circuit=CircuitPolicy(failure_threshold=1), limits=1, cache=False)
    provider.script(StallStream(3, 1.0))
    started = asyncio.Event()
    task = asyncio.create_task(consume(lm, is_async=is_async, started=started))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lm.circuit.state == "closed"
    with anyio.fail_after(20):
        chunks, _ = await consume(lm, "another", is_async=is_async)
    assert chunks > 3


async def test_the_permit_is_held_until_the_last_chunk(provider, make):
    """With one place, a second stream starts after the first has ended."""
    lm = make(limits=1, cache=False)
    results = await asyncio.gather(consume(lm, "a"), consume(lm, "b"))
    assert [chunks > 3 for chunks, _ in results] == [True, True]
    first, second = provider.requests
    assert second.at > first.at


async def test_streams_neither_lead_nor_follow(provider, make):
    """Two identical streams at once are two requests."""
    lm = make()
    hold = Hold()
    provider.script(hold, hold)
    tasks = [asyncio.create_task(consume(lm)) for _ in range(2)]
    await asyncio.to_thread(provider.wait_for, 2)
    hold.release()
    for chunks, _ in await asyncio.gather(*tasks):
        assert chunks > 3


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_a_deadline_ends_a_stream_that_hangs(provider, make, is_async):
    """The deadline holds under a stream too."""
    lm = make(deadline=0.5)
    provider.script(Hang())
    with pytest.raises(DeadlineExceededError), anyio.fail_after(20):
        await consume(lm, is_async=is_async)
    assert provider.count == 1


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_a_stream_within_its_deadline_is_whole(make, is_async):
    """A deadline that is kept is not noticed."""
    chunks, prediction = await consume(make(deadline=30.0), is_async=is_async)
    assert chunks > 3
    assert prediction.answer


def test_a_sync_program_streams_synchronously(provider, make):
    """async_streaming=False yields from a plain generator."""
    program = dspy.streamify(dspy.Predict("question -> answer"), async_streaming=False)
    with dspy.context(lm=make()):
        values = list(program(question="q"))
    assert isinstance(values[-1], dspy.Prediction)
    assert len(values) > 3


def test_stream_as_a_keyword_is_refused(make, ask):
    """stream=True never reaches a provider; the message names streamify."""
    with pytest.raises(dspy.LMUnsupportedFeatureError, match="streamify"):
        ask(make(), "q", stream=True)
