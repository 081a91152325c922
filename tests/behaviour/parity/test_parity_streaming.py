"""What a streamed program gives its consumer: the same chunks, messages and prediction as `dspy.LM`."""

from __future__ import annotations

import dspy
import pytest
from dspy.streaming import StatusMessageProvider, StreamListener

from dspy_resilient.testing import Reset, Status, dspy_answers

# How a streamed program runs, and what reads it.
WAYS = ["sync in sync", "sync in async", "async in async"]
one_way = pytest.mark.parametrize("streamed", WAYS[2:], indirect=True)
both_ends = pytest.mark.parametrize("streamed", WAYS[::2], indirect=True)

ANSWER = {"Capital of France?": "Paris is the capital of France and a large town on the Seine"}
QUESTION = "Capital of France?"


class Answer(dspy.Signature):
    """Answer."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Check(dspy.Signature):
    """Check."""

    answer: str = dspy.InputField()
    verdict: str = dspy.OutputField()


class Program(dspy.Module):
    """Two modules, with both ways to be called."""

    def __init__(self):
        super().__init__()
        self.think = dspy.Predict(Answer)
        self.check = dspy.Predict(Check)

    def forward(self, question):
        answer = self.think(question=question).answer
        return dspy.Prediction(answer=answer, verdict=self.check(answer=answer).verdict)

    async def aforward(self, question):
        answer = (await self.think.acall(question=question)).answer
        verdict = (await self.check.acall(answer=answer)).verdict
        return dspy.Prediction(answer=answer, verdict=verdict)


class Messages(StatusMessageProvider):
    """Says something at each opportunity."""

    def lm_start_status_message(self, instance, inputs):
        return f"asking {instance.model} {sorted(inputs)}"

    def lm_end_status_message(self, outputs):
        return f"answered {outputs}"

    def module_start_status_message(self, instance, inputs):
        return f"running {type(instance).__name__}"


@pytest.fixture(params=WAYS)
def streamed(request, on_a_loop):
    """Stream a program to its end: `forward` or `aforward`, read from sync or from async code."""
    is_async_program, reads_async = request.param[:5] == "async", request.param[-5:] == "async"

    def run(program, **options):
        stream = dspy.streamify(
            program, is_async_program=is_async_program, async_streaming=reads_async, **options
        )(question=QUESTION)
        if not reads_async:
            return list(stream)

        async def read():
            return [item async for item in stream]

        return on_a_loop(read())

    return run


def test_a_listener_hears_the_same(compare, streamed):
    """The chunks of a field, then the prediction."""

    def scenario(lm):
        return streamed(
            Program(), stream_listeners=[StreamListener("answer"), StreamListener("verdict")]
        )

    theirs, mine = compare(scenario, answer=dspy_answers(ANSWER))
    assert len(theirs.result) > 3
    assert mine.attempts == [1, 1]


@one_way
@pytest.mark.parametrize("adapter", [dspy.JSONAdapter, dspy.XMLAdapter])
def test_a_listener_of_another_adapter(compare, streamed, adapter):
    """The same for each of them."""

    def scenario(lm):
        listeners = [StreamListener("answer"), StreamListener("verdict")]
        with dspy.context(adapter=adapter()):
            return streamed(Program(), stream_listeners=listeners)

    theirs, _ = compare(scenario, answer=dspy_answers(ANSWER))
    assert len(theirs.result) > 3


def test_raw_chunks(compare, streamed):
    """Without a listener LiteLLM's own chunks arrive, one by one."""
    theirs, _ = compare(lambda lm: streamed(Program()), answer=dspy_answers(ANSWER))
    if not hasattr(dspy.LM, "generate"):  # from DSPy 3.5 on they are DSPy's own
        assert theirs.result[0][0] == "ModelResponseStream"


@both_ends
def test_status_messages(compare, streamed):
    """Of modules and of LM calls, with the same texts in the same order."""

    def scenario(lm):
        return streamed(
            Program(),
            status_message_provider=Messages(),
            stream_listeners=[StreamListener("answer")],
        )

    theirs, _ = compare(scenario, answer=dspy_answers(ANSWER))
    said = [each[1]["message"] for each in theirs.result if each[0] == "StatusMessage"]
    assert any("asking" in message for message in said)
    assert any("answered" in message for message in said)


def test_a_hit_streams_the_prediction_alone(compare, streamed):
    """As with dspy.LM; status messages go on."""

    def scenario(lm):
        listeners = [StreamListener("answer", allow_reuse=True)]
        return [streamed(Program(), stream_listeners=listeners) for _ in range(2)]

    theirs, mine = compare(scenario, answer=dspy_answers(ANSWER))
    assert [each[0] for each in theirs.result[1]] == ["Prediction"]
    assert mine.hits == [False, False, True, True]


@both_ends
def test_streamed_and_plain_calls_share_their_answers(compare, streamed):
    """What was streamed is found by an ordinary call."""

    def scenario(lm):
        streamed(dspy.Predict(Answer))
        return dspy.Predict(Answer)(question=QUESTION)

    _, mine = compare(
        scenario, answer=dspy_answers(ANSWER), but=("requests", "history", "hits", "marks", "usage")
    )
    assert len(mine.requests) == 1


@pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning")  # LiteLLM's own
def test_usage_of_a_stream(compare, streamed):
    """`track_usage` asks the provider for it, and has it."""

    def scenario(lm):
        with dspy.context(track_usage=True, usage_tracker=None):
            prediction = streamed(Program(), stream_listeners=[StreamListener("answer")])[-1]
        return prediction, prediction.get_lm_usage()

    theirs, _ = compare(scenario, answer=dspy_answers(ANSWER))
    assert theirs.requests[0]["body"]["stream_options"] == {"include_usage": True}
    assert theirs.result[1]["openai/gpt-4o-mini"]["total_tokens"] > 0


@one_way
@pytest.mark.parametrize("model", ["anthropic/claude-haiku-4-5", "gemini/gemini-2.0-flash"])
def test_other_providers_stream(compare, streamed, model):
    """Over their own protocols."""

    def scenario(lm):
        return streamed(Program(), stream_listeners=[StreamListener("answer")])

    theirs, _ = compare(scenario, model=model, answer=dspy_answers(ANSWER))
    assert len(theirs.result) > 3


@both_ends
@pytest.mark.parametrize("model_type", ["chat", "responses"])
def test_the_native_engine_streams(compare, streamed, model_type):
    """Its chunks are DSPy's own."""

    def scenario(lm):
        return streamed(Program(), stream_listeners=[StreamListener("answer")])

    theirs, _ = compare(scenario, engine="lm15", model_type=model_type, answer=dspy_answers(ANSWER))
    assert len(theirs.result) > 3


@both_ends
@pytest.mark.parametrize("fault", [Status(400), Status(500), Reset()], ids=repr)
def test_errors_of_a_stream(compare, streamed, fault):
    """Class and text are those of dspy.LM (section 2)."""

    def scenario(lm):
        return streamed(Program(), stream_listeners=[StreamListener("answer")])

    theirs, mine = compare(scenario, faults=[fault] * 2, num_retries=0, may_raise=True)
    assert isinstance(theirs.error, dspy.LMError)
    assert len(mine.error.attempts) == 1


@one_way
def test_a_stream_is_retried_before_its_first_chunk(compare, streamed):
    """The consumer sees nothing of it."""

    def scenario(lm):
        return streamed(Program(), stream_listeners=[StreamListener("answer")])

    theirs, mine = compare(
        scenario, answer=dspy_answers(ANSWER), faults=[Status(500)], num_retries=1
    )
    assert len(theirs.result) > 3
    assert mine.attempts == [2, 1]


def test_asyncify(compare, on_a_loop):
    """`dspy.asyncify` runs the program on a thread."""

    def scenario(lm):
        return on_a_loop(dspy.asyncify(Program())(question=QUESTION))

    compare(scenario, answer=dspy_answers(ANSWER))


def test_syncify(compare):
    """`dspy.syncify` runs an async program from sync code."""

    def scenario(lm):
        return dspy.syncify(Program())(question=QUESTION)

    compare(scenario, answer=dspy_answers(ANSWER))
