"""DSPy's modules, adapters, types and optimizers run on `ResilientLM` as they do on `dspy.LM`."""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from typing import Literal

import dspy
import pydantic
import pytest

from dspy_resilient.testing import Status, context_too_long, dspy_answers

CAPITALS = {"Capital of France?": "Paris", "Capital of Italy?": "Rome", "Capital of Peru?": "Lima"}
EXAMPLES = [
    dspy.Example(question=question, answer=answer).with_inputs("question")
    for question, answer in CAPITALS.items()
]
ADAPTERS = {
    "chat": lambda lm: dspy.ChatAdapter(),
    "json": lambda lm: dspy.JSONAdapter(),
    "xml": lambda lm: dspy.XMLAdapter(),
    "two steps": lambda lm: dspy.TwoStepAdapter(extraction_model=lm),
}


class City(pydantic.BaseModel):
    name: str
    people: int


class About(dspy.Signature):
    """Say what you know."""

    question: str = dspy.InputField()
    city: City = dspy.OutputField()
    size: Literal["small", "large"] = dspy.OutputField()
    tags: list[str] = dspy.OutputField()


def right(example, prediction, trace=None):
    return example.answer == prediction.answer


@pytest.fixture(params=["chat", "json", "xml", "two steps"])
def adapt(request):
    """Set an adapter for one scenario: `with adapt(lm): …`."""
    return lambda lm: dspy.context(adapter=ADAPTERS[request.param](lm))


def test_predict(compare, call, adapt):
    """Every adapter formats, asks and parses alike."""

    def scenario(lm):
        with adapt(lm):
            return call(dspy.Predict("question -> answer"), question="Capital of France?")

    compare(scenario, answer=dspy_answers(CAPITALS))


def test_typed_fields_and_demos(compare, call, adapt):
    """Structured output, where the model has it natively, and few-shot examples."""

    def scenario(lm):
        program = dspy.ChainOfThought(About)
        program.predict.demos = [
            dspy.Example(
                question="?",
                reasoning="so",
                city=City(name="Rome", people=3),
                size="large",
                tags=["old"],
            )
        ]
        with adapt(lm):
            return call(program, question="Capital of France?")

    compare(scenario, answer=dspy_answers(), may_raise=True)


def test_native_structured_output(compare, call):
    """The schema goes over the wire."""

    def scenario(lm):
        with dspy.context(adapter=dspy.JSONAdapter()):
            return call(dspy.Predict(About), question="Capital of France?")

    theirs, _ = compare(scenario, answer=dspy_answers())
    assert theirs.requests[0]["body"]["response_format"]["type"] == "json_schema"


@pytest.mark.parametrize("native", [True, False], ids=["native", "in the prompt"])
@pytest.mark.parametrize("model_type", ["chat", "responses"])
def test_native_tool_calls(compare, call, native, model_type):
    """Tools go over the wire, and the calls come back."""

    def weather(city: str) -> str:
        """How the weather is."""
        return f"fine in {city}"

    class Act(dspy.Signature):
        question: str = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        calls: dspy.ToolCalls = dspy.OutputField()

    def scenario(lm):
        adapter = dspy.ChatAdapter(use_native_function_calling=native)
        with dspy.context(adapter=adapter):
            return call(dspy.Predict(Act), question="Rome?", tools=[dspy.Tool(weather)])

    answer = {"tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}
    given = answer if native else dspy_answers()
    compare(scenario, answer=given, model_type=model_type, may_raise=True)


def test_react(compare, call):
    """An agent with a tool, step by step."""

    def population(city: str) -> int:
        """How many people live there."""
        return {"Paris": 2_100_000}.get(city, 0)

    steps = {
        "How many?": {
            "next_thought": "look it up",
            "next_tool_name": "population",
            "next_tool_args": {"city": "Paris"},
            "answer": "two million",
        }
    }

    def scenario(lm):
        return call(dspy.ReAct("question -> answer", tools=[population]), question="How many?")

    theirs, _ = compare(scenario, answer=dspy_answers(steps))
    assert theirs.result[1]["answer"] == "two million"
    assert theirs.result[1]["trajectory"]["observation_0"] == 2_100_000


def test_react_cuts_its_trajectory_when_the_window_is_full(compare, call):
    """ContextWindowExceededError reaches ReAct unchanged, which then tries with less."""

    def scenario(lm):
        return call(dspy.ReAct("question -> answer", tools=[]), question="How many?")

    compare(scenario, answer=dspy_answers(), faults=[None, context_too_long()], may_raise=True)


def test_several_completions(compare, call):
    """`n` in a module's config gives as many completions."""

    def scenario(lm):
        program = dspy.Predict("question -> answer", n=3, temperature=1.0)
        prediction = call(program, question="Capital of France?")
        return prediction, prediction.completions.answer

    theirs, _ = compare(scenario, answer=dspy_answers(CAPITALS))
    assert theirs.result[1] == ["Paris"] * 3
    assert len(theirs.requests) == (3 if hasattr(dspy.LM, "generate") else 1)  # each its own


def test_logprobs_of_a_prediction(compare, call):
    """`logprobs` come with the prediction."""

    def scenario(lm):
        program = dspy.Predict("question -> answer", logprobs=True)
        return call(program, question="Capital of France?")

    theirs, _ = compare(scenario, answer=dspy_answers(CAPITALS))
    assert theirs.result[1]["logprobs"]


def test_reasoning_of_a_model(compare, call):
    """Native reasoning of the Responses API and of reasoning models."""

    class Think(dspy.Signature):
        question: str = dspy.InputField()
        reasoning: dspy.Reasoning = dspy.OutputField()
        answer: str = dspy.OutputField()

    def answer(body):
        return {"text": dspy_answers()(body), "reasoning": "let me think"}

    def scenario(lm):
        return call(dspy.Predict(Think), question="Capital of France?")

    for model, model_type in [
        ("openai/gpt-5", "responses"),
        ("anthropic/claude-haiku-4-5", "chat"),
    ]:
        compare(scenario, model=model, answer=answer, model_type=model_type)


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine], ids=lambda kind: kind.__name__)
def test_best_of_several(compare, kind):
    """Each rollout is a call of its own, on the same client."""
    told = itertools.cycle(["Lyon", "Paris", "Rome"])
    answer = dspy_answers(lambda given: next(told) if given in CAPITALS else None)

    def scenario(lm):
        program = kind(
            module=dspy.Predict("question -> answer"),
            N=3,
            reward_fn=lambda _, prediction: float(prediction.answer == "Rome"),
            threshold=1.0,
        )
        return program(question="Capital of Italy?")

    theirs, _ = compare(scenario, answer=answer)
    assert theirs.result[1]["answer"] == "Rome"


def test_parallel(compare):
    """Threads share the client."""

    def scenario(lm):
        program = dspy.Predict("question -> answer")
        pairs = [(program, {"question": question}) for question in CAPITALS]
        return [
            each.answer for each in dspy.Parallel(num_threads=3, disable_progress_bar=True)(pairs)
        ]

    theirs, mine = compare(
        scenario, answer=dspy_answers(CAPITALS), but=("requests", "history", "callbacks")
    )
    assert theirs.result == list(CAPITALS.values())
    assert _bodies(mine) == _bodies(theirs)


def test_batch(compare):
    """`Module.batch`."""

    def scenario(lm):
        program = dspy.Predict("question -> answer")
        return program.batch(EXAMPLES, num_threads=1, disable_progress_bar=True)

    compare(scenario, answer=dspy_answers(CAPITALS))


def test_evaluate(compare):
    """The same score and the same results."""

    def scenario(lm):
        evaluate = dspy.Evaluate(
            devset=EXAMPLES, metric=right, num_threads=2, display_progress=False
        )
        outcome = evaluate(dspy.ChainOfThought("question -> answer"))
        return outcome.score, [score for _, _, score in outcome.results]

    theirs, mine = compare(
        scenario,
        answer=dspy_answers({**CAPITALS, "Capital of Peru?": "Cusco"}),
        but=("requests", "history", "callbacks"),
    )
    assert theirs.result == [66.67, [True, True, False]]
    assert _bodies(mine) == _bodies(theirs)


def test_bootstrap_few_shot(compare):
    """The same demos."""

    def scenario(lm):
        optimizer = dspy.BootstrapFewShot(metric=right, max_rounds=2, max_bootstrapped_demos=2)
        compiled = optimizer.compile(dspy.Predict("question -> answer"), trainset=EXAMPLES)
        return [dict(demo) for demo in compiled.demos], compiled(question="Capital of Peru?")

    theirs, _ = compare(scenario, answer=dspy_answers({**CAPITALS, "Capital of France?": "Lyon"}))
    assert len(theirs.result[0]) == 3


def test_mipro(compare):
    """MIPROv2 proposes, tries and picks the same; it needs the optuna extra of DSPy."""
    pytest.importorskip("optuna")

    def scenario(lm):
        optimizer = dspy.MIPROv2(
            metric=right,
            auto=None,
            num_candidates=2,
            max_bootstrapped_demos=1,
            max_labeled_demos=1,
            num_threads=1,
            verbose=False,
        )
        compiled = optimizer.compile(
            dspy.Predict("question -> answer"),
            trainset=EXAMPLES,
            valset=EXAMPLES,
            num_trials=2,
            minibatch=False,
            data_aware_proposer=False,
            tip_aware_proposer=False,
        )
        return compiled.score, compiled.signature.instructions, len(compiled.demos)

    theirs, mine = compare(scenario, answer=dspy_answers(CAPITALS), but=("history", "callbacks"))
    assert theirs.result[0] == 100.0
    assert len(mine.history) == len(theirs.history)


def test_gepa(compare):
    """GEPA reflects on failures and ends with the same instructions."""

    def feedback(example, prediction, trace=None, pred_name=None, pred_trace=None):
        score = float(example.answer == prediction.answer)
        return dspy.Prediction(score=score, feedback="right" if score else "wrong city")

    def scenario(lm):
        optimizer = dspy.GEPA(
            metric=feedback,
            max_metric_calls=12,
            reflection_lm=lm,
            reflection_minibatch_size=2,
            num_threads=1,
            track_stats=True,
            seed=0,
        )
        compiled = optimizer.compile(
            dspy.Predict("question -> answer"), trainset=EXAMPLES, valset=EXAMPLES
        )
        return compiled.signature.instructions, compiled.detailed_results.val_aggregate_scores

    table = {**CAPITALS, "Capital of Peru?": "Cusco"}
    theirs, _ = compare(scenario, answer=dspy_answers(table))
    assert len(theirs.requests) > len(EXAMPLES)


def _png():
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\0")
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


MEDIA = {
    "an image's address": lambda: dspy.Image("https://example.org/a.png"),
    "an image": lambda: dspy.Image(f"data:image/png;base64,{base64.b64encode(_png()).decode()}"),
    "audio": lambda: dspy.Audio(data="aGVsbG8=", audio_format="wav"),
    "a file": lambda: dspy.File.from_bytes(
        b"%PDF-1.4", filename="a.pdf", mime_type="application/pdf"
    ),
}


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("model_type", ["chat", "responses"])
def test_media(compare, call, medium, model_type):
    """Images, audio and files reach the wire in the same form, and hits are found."""
    value = MEDIA[medium]()
    signature = dspy.Signature({"medium": (type(value), dspy.InputField())}).append(
        "answer", dspy.OutputField(), str
    )

    def scenario(lm):
        program = dspy.Predict(signature)
        return call(program, medium=value), call(program, medium=value)

    theirs, _ = compare(scenario, answer=dspy_answers(), model_type=model_type, may_raise=True)
    assert len(theirs.requests) <= 1


def test_a_conversation(compare, call):
    """`dspy.History` becomes turns."""

    class Chat(dspy.Signature):
        question: str = dspy.InputField()
        history: dspy.History = dspy.InputField()
        answer: str = dspy.OutputField()

    def scenario(lm):
        past = dspy.History(messages=[{"question": "Hi?", "answer": "Hello"}])
        return call(dspy.Predict(Chat), question="Capital of France?", history=past)

    compare(scenario, answer=dspy_answers())


def test_an_answer_no_adapter_can_read(compare, call):
    """The JSON fallback is tried and AdapterParseError raised, as with dspy.LM."""

    def scenario(lm):
        return call(dspy.Predict("question -> number: int"), question="How many?")

    theirs, _ = compare(scenario, answer="no idea", raises=dspy.AdapterParseError)
    assert len(theirs.requests) == 2


def test_a_providers_error_goes_through_a_program(compare, call):
    """No adapter takes it for a parse failure and asks again."""

    def scenario(lm):
        return call(dspy.Predict("question -> answer"), question="q")

    theirs, _ = compare(scenario, faults=[Status(400)], raises=dspy.LMInvalidRequestError)
    assert len(theirs.requests) == 1


def test_each_module_may_have_an_lm_of_its_own(compare, call):
    """`set_lm`, `dspy.context` and `lm=` of a call."""

    def scenario(lm):
        program = dspy.Predict("question -> answer")
        other = lm.copy(temperature=0.9)
        first = call(program, question="Capital of France?")
        with dspy.context(lm=other):
            second = call(program, question="Capital of France?")
        third = call(program, question="Capital of France?", lm=lm.copy(seed=1))
        program.set_lm(lm.copy(max_tokens=7))
        return first, second, third, call(program, question="Capital of France?")

    theirs, _ = compare(scenario, answer=dspy_answers(CAPITALS))
    assert len(theirs.requests) == 4


def test_a_copied_program(compare, call):
    """`deepcopy` and `reset_copy` keep working, and use the same client."""

    def scenario(lm):
        program = dspy.Predict("question -> answer")
        program.set_lm(lm)
        twin, blank = program.deepcopy(), program.reset_copy()
        blank.set_lm(lm)
        return [call(each, question="Capital of Italy?") for each in (program, twin, blank)]

    theirs, _ = compare(scenario, answer=dspy_answers(CAPITALS))
    assert len(theirs.requests) == 1


def _bodies(seen):
    return sorted(str(request["body"]) for request in seen.requests)
