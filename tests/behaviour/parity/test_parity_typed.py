"""Typed requests and other engines: `dspy.lm15.Request` in, `Response` out, as with `dspy.LM`."""

from __future__ import annotations

import dataclasses

import dspy
import pytest
from dspy.lm15 import Config, FunctionTool, Message, Request, Response, Usage

from dspy_resilient.testing import Status, dspy_answers

MODEL = "openai/gpt-4o-mini"
ENGINES = ["litellm", "auto", "lm15"]


def request(text="Capital of France?", model=MODEL, **options):
    return Request(model=model, messages=(Message.user(text),), **options)


class Engine:
    """An engine of the user's own; its answers are counted."""

    def __init__(self):
        self.asked = []

    def complete(self, request):
        self.asked.append(request)
        message = Message.assistant("[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]")
        usage = Usage(input_tokens=3, output_tokens=1, total_tokens=4)
        return Response(id="1", model="mine", message=message, finish_reason="stop", usage=usage)


class AsyncEngine(Engine):
    async def complete(self, request):
        return super().complete(request)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_typed_request(compare, call, engine):
    """Response, wire, history, usage and callbacks."""
    theirs, _ = compare(lambda lm: call(lm, request()), engine=engine)
    assert theirs.result[0] == "Response"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_typed_request_by_keyword(compare, call, engine):
    """`request=` is the other spelling."""
    compare(lambda lm: call(lm, request=request()), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_typed_request_with_everything(compare, call, engine):
    """System prompt, settings and tools go where dspy.LM sends them."""
    config = Config(temperature=0.2, max_tokens=30, stop=("x",), seed=1, top_p=0.5)
    tool = FunctionTool(name="weather", parameters={"type": "object", "properties": {}})
    answer = {"tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}
    asked = request(system="Be brief.", config=config, tools=(tool,))
    compare(lambda lm: call(lm, asked), engine=engine, answer=answer)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_typed_hit(compare, call, engine):
    """A hit's entry names the request and shows its messages."""
    theirs, mine = compare(lambda lm: (call(lm, request()), call(lm, request())), engine=engine)
    assert theirs.marks == [None, None]  # a Response takes no mark; ours is in the entry
    assert mine.hits == [False, True]


def test_typed_and_ordinary_calls_do_not_share_an_answer(compare, call):
    """They have different shapes."""
    theirs, _ = compare(lambda lm: (call(lm, "q"), call(lm, request("q"))))
    assert len(theirs.requests) == 2


@pytest.mark.parametrize("model_type", ["chat", "responses", "text"])
def test_typed_requests_of_every_model_type(compare, call, model_type):
    """Text completions take none, and say so."""
    compare(lambda lm: call(lm, request()), model_type=model_type, may_raise=True, num_retries=0)


@pytest.mark.parametrize(
    "wrong",
    ["another model", "options", "twice", "messages", "no request", "temperature"],
)
def test_what_a_typed_call_refuses(compare, call, wrong):
    """The same TypeError or ValueError, before anything is sent or looked up."""
    good = request()
    given = {
        "another model": ((request(model="openai/other"),), {}),
        "options": ((good,), {"temperature": 0.5}),
        "twice": ((good,), {"request": good}),
        "messages": ((good,), {"messages": []}),
        "no request": ((), {"request": "text"}),
        "temperature": ((), {"request": good, "rollout_id": 1, "n": 2}),
    }
    args, kwargs = given[wrong]
    theirs, mine = compare(lambda lm: call(lm, *args, **kwargs), may_raise=True)
    assert isinstance(theirs.error, (TypeError, ValueError))
    assert mine.requests == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "ordinary"])
@pytest.mark.parametrize("code", [400, 401, 429, 500])
def test_errors_of_every_engine(compare, call, engine, typed, code):
    """Class, text, status and cause are those of dspy.LM (section 2)."""
    prompt = request() if typed else "q"
    fault = Status(code, retry_after=3600) if code == 429 else Status(code)
    theirs, mine = compare(
        lambda lm: call(lm, prompt),
        faults=[fault] * 2,
        engine=engine,
        num_retries=0,
        may_raise=True,
    )
    assert isinstance(theirs.error, dspy.LMError)
    assert len(mine.error.attempts) == 1


@pytest.mark.parametrize("engine", ["auto", "lm15"])
@pytest.mark.parametrize(
    "settings", [{}, {"n": 2, "temperature": 1.0}, {"logprobs": True}], ids=str
)
def test_an_ordinary_call_on_another_engine(compare, call, engine, settings):
    """The native engine serves ordinary calls, hits and programs too."""

    def asked(lm):
        program = dspy.ChainOfThought("question -> answer")
        return (
            call(lm, "q", **settings),
            call(lm, "q", **settings),
            call(program, question="Capital of France?", config=settings),
        )

    theirs, mine = compare(asked, engine=engine, answer=dspy_answers())
    assert mine.attempts == [1, 0, 1]
    assert len(theirs.history) == 3


@pytest.mark.parametrize("settings", [{"extra_body": {"x": 1}}, {"organization": "o"}], ids=str)
def test_what_auto_sends_through_litellm(compare, call, settings):
    """Where "auto" falls back on LiteLLM one attempt is still one request."""
    compare(lambda lm: call(lm, "q", **settings), engine="auto")
    theirs, _ = compare(
        lambda lm: call(lm, "q", **settings),
        engine="auto",
        faults=[Status(500)],
        num_retries=0,
        raises=dspy.LMServerError,
    )
    assert len(theirs.requests) == 1


def test_a_custom_engine(compare, call):
    """An engine object of the user's own: typed and ordinary calls, programs and hits."""
    engines = []

    def asked(lm):
        engines.append((lm.engine, len(lm.engine.asked)))
        program = dspy.Predict("question -> answer")
        return call(lm, request()), call(lm, "q"), call(lm, "q"), call(program, question="q")

    compare(asked, engine=Engine(), async_engine=AsyncEngine())
    assert engines[0][0] is engines[1][0]


def test_a_custom_engine_owns_its_connection(compare, call):
    """Client settings are refused, at construction and in a call, as by dspy.LM."""
    for build in (dspy.LM, _ours()):
        with pytest.raises(ValueError, match="a custom engine owns its own"):
            build(MODEL, engine=Engine(), api_key="k")
    compare(
        lambda lm: call(lm, "q", api_key="k"),
        engine=Engine(),
        async_engine=AsyncEngine(),
        raises=ValueError,
    )


def test_a_custom_engine_without_an_async_half(compare, call):
    """`acall` says what is missing."""
    compare(lambda lm: call(lm, "q"), engine=Engine(), may_raise=True)


def test_prompt_cache(compare, call):
    """`prompt_cache` reaches the native engine, and is refused where there is none."""
    policy = dspy.lm15.CacheConfig(mode="auto")
    compare(lambda lm: call(lm, "q"), engine="auto", prompt_cache=policy, may_raise=True)
    compare(lambda lm: call(lm, "q", prompt_cache=policy), engine="litellm", may_raise=True)
    assert _ours()(MODEL, prompt_cache=policy).engine == "auto"


def _ours():
    from dspy_resilient import ResilientLM

    return ResilientLM


def test_a_request_is_not_changed(compare, call):
    """The caller's object is read, never written; the response is the provider's."""
    asked = request()
    before = dataclasses.asdict(asked)
    compare(lambda lm: call(lm, asked))
    assert dataclasses.asdict(asked) == before
