"""DSPy programs run against the local provider with `dspy_answers`, in every format."""

from __future__ import annotations

import enum
import json
from typing import Any, Literal

import dspy
import pydantic
import pytest

from dspy_resilient.testing import Provider, dspy_answers

pytestmark = [
    pytest.mark.usefixtures("on_a_loop"),  # closes LiteLLM's clients in the end
    # Not ours to mend: what LiteLLM's types say on first use of a provider.
    pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier:UserWarning"),
]

ADAPTERS = [
    dspy.ChatAdapter(use_json_adapter_fallback=False),
    dspy.JSONAdapter(),
    dspy.XMLAdapter(use_json_adapter_fallback=False),
]
EVERY_ADAPTER = pytest.mark.parametrize("adapter", ADAPTERS, ids=["chat", "json", "xml"])


class Color(enum.Enum):
    RED = "r"
    BLUE = "b"


class Place(pydantic.BaseModel):
    name: str
    people: int
    rivers: list[str]


class Everything(dspy.Signature):
    """Answer in every type."""

    question: str = dspy.InputField()
    context: list[str] = dspy.InputField()
    reasoning: str = dspy.OutputField()
    answer: str = dspy.OutputField(desc="short")
    sure: bool = dspy.OutputField()
    count: int = dspy.OutputField()
    share: float = dspy.OutputField()
    mood: Literal["good", "bad"] = dspy.OutputField()
    level: Literal[1, 2] = dspy.OutputField()
    color: Color = dspy.OutputField()
    tags: list[str] = dspy.OutputField()
    place: Place = dspy.OutputField()
    maybe: int | None = dspy.OutputField()
    scores: dict[str, int] = dspy.OutputField()
    anything: dict[str, Any] = dspy.OutputField()


class Tree(pydantic.BaseModel):
    children: list[Tree]
    parent: Tree | None
    kind: Literal["oak"] = "oak"


def answered(adapter, signature, inputs, table=None, demos=()):
    """What the adapter parses from the answer to the prompt that it wrote."""
    messages = adapter.format(signature, list(demos), inputs)
    return adapter.parse(signature, dspy_answers(table)({"messages": messages}))


@EVERY_ADAPTER
def test_every_field_gets_a_value_of_its_type(adapter):
    """Without a table each output parses, and the same prompt gets the same answer."""
    inputs = {"question": "Why?", "context": ["a", "b"]}
    fields = answered(adapter, Everything, inputs)
    assert fields == answered(adapter, Everything, inputs)
    assert fields["answer"] == "answer for Why?"
    assert (fields["sure"], fields["count"], fields["share"]) == (True, 1, 1.0)
    assert (fields["mood"], fields["level"], fields["color"]) == ("good", 1, Color.RED)
    assert isinstance(fields["place"], Place)


@EVERY_ADAPTER
def test_the_table_is_asked_for_the_input_values(adapter):
    """The first known input decides; its text goes to the first field that is not reasoning."""
    inputs = {"question": "  Capital of\nFrance? ", "context": ["x"]}
    table = {"Capital of\nFrance?": "Paris & <Orly>\n\nand more"}
    fields = answered(adapter, Everything, inputs, table)
    assert fields["answer"] == "Paris & <Orly>\n\nand more"
    assert fields["reasoning"].startswith("reasoning for Capital of France?")


@EVERY_ADAPTER
def test_a_mapping_fills_the_fields_it_names(adapter):
    """Fields in the table win over made-up values; others are left out."""
    entry = {"answer": "42", "count": 42, "mood": "bad", "unknown": 1}
    fields = answered(adapter, Everything, {"question": "q", "context": []}, {"q": entry})
    assert (fields["answer"], fields["count"], fields["mood"]) == ("42", 42, "bad")


@EVERY_ADAPTER
def test_a_function_is_asked_with_the_first_input(adapter):
    """The table may be code; None stands for unknown."""
    table = {"up": "UP"}.get
    for question, answer in (("up", "UP"), ("down", "answer for down")):
        fields = answered(adapter, Everything, {"question": question, "context": []}, table)
        assert fields["answer"] == answer


@EVERY_ADAPTER
def test_demos_are_not_taken_for_the_question(adapter):
    """Only the last message is answered."""
    demo = {"question": "old", "answer": "old answer"}
    inputs = {"question": "new", "context": []}
    table = {"old": "wrong", "new": "right"}
    assert answered(adapter, Everything, inputs, table, [demo])["answer"] == "right"


@pytest.mark.parametrize("adapter", ADAPTERS[:2], ids=["chat", "json"])
def test_recursive_types_end(adapter):
    """A schema that refers to itself gets a finite value."""
    signature = dspy.Signature("question -> tree: Tree", custom_types={"Tree": Tree})
    assert isinstance(answered(adapter, signature, {"question": "q"})["tree"], Tree)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"prompt": "hi"},
        {"input": "hi"},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
        {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]},
    ],
    ids=["chat", "parts", "text", "responses", "items", "gemini"],
)
def test_a_plain_prompt_is_looked_up_or_echoed(body):
    """What no adapter wrote is answered as it stands, in any dialect."""
    assert dspy_answers()(body) == "hi"
    assert dspy_answers({"hi": "hello"})(body) == "hello"
    assert dspy_answers({"hi": {"a": 1}})(body) == '{"a": 1}'


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": [{"role": "user"}]}])
def test_an_empty_prompt_gets_an_empty_answer(body):
    """Nothing asked, nothing said."""
    assert dspy_answers()(body) == ""
    assert dspy_answers(lambda text: None)(body) == ""


# --- over HTTP


@pytest.fixture
def provider():
    with Provider(dspy_answers({"Capital?": "Paris"})) as running:
        yield running


def lm(provider, model="openai/gpt-4o-mini", **options):
    base = provider.base(model.partition("/")[0])
    options = {"engine": "litellm", "cache": False, "num_retries": 0, **options}
    return dspy.LM(model, api_base=base, api_key="dummy", **options)


@pytest.fixture(params=["sync", "async"])
def run(request, on_a_loop):
    if request.param == "sync":
        return lambda program, **inputs: program(**inputs)
    return lambda program, **inputs: on_a_loop(program.acall(**inputs))


@EVERY_ADAPTER
def test_programs_run(provider, adapter, run):
    """Predict and ChainOfThought get their answers in one request each."""
    with dspy.context(lm=lm(provider), adapter=adapter):
        for module in (dspy.Predict, dspy.ChainOfThought):
            assert run(module("question -> answer"), question="Capital?").answer == "Paris"
    assert provider.count == 2


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("openai/gpt-4o-mini", {"model_type": "responses"}),
        ("openai/gpt-4o-mini", {"engine": "auto"}),
        ("text-completion-openai/gpt-3.5-turbo-instruct", {"model_type": "text"}),
        ("anthropic/claude-haiku-4-5", {}),
        ("gemini/gemini-2.0-flash", {}),
        ("ollama_chat/m", {}),
    ],
    ids=["responses", "auto", "text", "anthropic", "gemini", "ollama"],
)
def test_programs_run_over_every_route(provider, model, options):
    """The prompt is found in every dialect's body."""
    with dspy.context(lm=lm(provider, model, **options), adapter=dspy.ChatAdapter()):
        assert dspy.ChainOfThought("question -> answer")(question="Capital?").answer == "Paris"


@EVERY_ADAPTER
def test_an_agent_finishes_at_once(provider, adapter):
    """ReAct takes one step, finishes, and reads its answer out: two requests."""
    with dspy.context(lm=lm(provider), adapter=adapter):
        agent = dspy.ReAct("question -> answer", tools=[lambda city: city])
        assert agent(question="Capital?").answer == "Paris"
    assert provider.count == 2


@EVERY_ADAPTER
def test_an_agent_uses_the_tool_that_the_table_names(provider, adapter):
    """The named tool is called once, then the agent finishes."""
    asked = []

    def weather(city: str) -> str:
        """Tell the weather."""
        asked.append(city)
        return f"sunny in {city}"

    step = {"next_tool_name": "weather", "next_tool_args": {"city": "Rome"}, "answer": "sunny"}
    provider.answer = dspy_answers({"Weather?": step})
    with dspy.context(lm=lm(provider), adapter=adapter):
        agent = dspy.ReAct("question -> answer", tools=[weather])
        assert agent(question="Weather?").answer == "sunny"
    assert (asked, provider.count) == (["Rome"], 3)


def test_evaluate_scores_as_the_table_says(provider):
    """A whole evaluation on several threads."""
    provider.answer = dspy_answers({f"q{i}": f"a{i}" for i in range(6)})
    examples = [dspy.Example(question=f"q{i}", answer=f"a{i}") for i in range(8)]
    evaluate = dspy.Evaluate(
        devset=[example.with_inputs("question") for example in examples],
        metric=lambda example, prediction, trace=None: example.answer == prediction.answer,
        num_threads=4,
        display_progress=False,
    )
    warm = lm(provider)
    warm("hello")  # threads that race to be first each open a client, and LiteLLM drops all but one
    with dspy.context(lm=warm):
        assert evaluate(dspy.Predict("question -> answer")).score == 75.0


def test_streamify_streams_the_field(provider, on_a_loop):
    """A stream listener hears the answer word by word."""
    provider.answer = dspy_answers({"Say it.": "one two three four five"})

    async def listen():
        listener = dspy.streaming.StreamListener(signature_field_name="answer")
        program = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])
        with dspy.context(lm=lm(provider), adapter=dspy.ChatAdapter()):
            return [item async for item in program(question="Say it.")]

    *pieces, prediction = on_a_loop(listen())
    assert len(pieces) > 2
    assert "".join(piece.chunk for piece in pieces).split() == prediction.answer.split()
    assert prediction.answer == "one two three four five"


def test_a_json_schema_is_not_needed_in_the_prompt(provider):
    """JSONAdapter's structured output parses against the schema it sends."""
    with dspy.context(lm=lm(provider), adapter=dspy.JSONAdapter()):
        dspy.Predict("question -> answer, score: float")(question="Capital?")
    (request,) = provider.requests
    assert request.body["response_format"]["type"] == "json_schema"
    assert json.loads(json.dumps(request.body)) == request.body
