"""What tracing packages see of our calls: those that wrap `dspy.LM`'s methods, and MLflow's callback."""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
import sys
import warnings

import dspy
import pytest
from dspy.lm15 import Message, Request
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_resilient import ResilientLM, RetryPolicy
from dspy_resilient.testing import Status, dspy_answers

QUICK = RetryPolicy(base=0.001)
INSTRUMENTED = (
    dspy.LM, dspy.utils.DummyLM, dspy.Module, dspy.Predict, *dspy.Predict.__subclasses__(), dspy.Adapter, dspy.Tool,
    dspy.Retrieve, dspy.ColBERTv2,
)  # fmt: skip


class Recorder(dspy.utils.callback.BaseCallback):
    """Counts what callbacks are told about LM calls."""

    def __init__(self):
        self.told = []

    def on_lm_start(self, call_id, instance, inputs):
        self.told.append(("start", type(instance).__name__))

    def on_lm_end(self, call_id, outputs, exception=None):
        self.told.append(("end", type(exception).__name__))


class Wrapped:
    """A plain wrapper around `dspy.LM`'s call methods, as a tracing package of one's own has it."""

    def __init__(self, monkeypatch, kind=dspy.LM):
        self.seen = []
        for name in ("__call__", "acall"):
            monkeypatch.setattr(kind, name, self._around(getattr(kind, name)))

    def _around(self, method):
        seen = self.seen
        if asyncio.iscoroutinefunction(method):

            @functools.wraps(method)
            async def wrapper(lm, *args, **kwargs):
                try:
                    outputs = await method(lm, *args, **kwargs)
                except Exception as error:
                    seen.append((lm.model, type(error).__name__))
                    raise
                seen.append((lm.model, outputs))
                return outputs
        else:

            @functools.wraps(method)
            def wrapper(lm, *args, **kwargs):
                try:
                    outputs = method(lm, *args, **kwargs)
                except Exception as error:
                    seen.append((lm.model, type(error).__name__))
                    raise
                seen.append((lm.model, outputs))
                return outputs

        return wrapper


@pytest.fixture
def spans():
    """OpenInference's instrumentation of DSPy, at work for one test; the value returns its spans.

    Uninstrumenting takes DSPy's own wrapper off the methods too, the one that tells callbacks: the
    fixture puts back what it found.
    """
    instrumentation = pytest.importorskip("openinference.instrumentation.dspy")
    found = {kind: dict(vars(kind)) for kind in INSTRUMENTED}
    exporter = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = instrumentation.DSPyInstrumentor()
    instrumentor.instrument(tracer_provider=tracers)
    yield exporter.get_finished_spans
    instrumentor.uninstrument()
    for kind, attributes in found.items():
        for name in [*vars(kind)]:
            if name not in attributes:
                delattr(kind, name)
            elif vars(kind)[name] is not attributes[name]:
                setattr(kind, name, attributes[name])


def of_lms(spans):
    """Those of LM calls."""
    return [each for each in spans if each.attributes["openinference.span.kind"] == "LLM"]


def test_a_plain_wrapper_sees_each_attempt(monkeypatch, provider, make, ask):
    """With its error or its outputs; callbacks are told of the call, once."""
    wrapped, recorder = Wrapped(monkeypatch), Recorder()
    provider.script(Status(500))
    lm = make(callbacks=[recorder], retry=QUICK)
    with dspy.context(callbacks=[recorder]):
        assert ask(lm, "q") == ["Paris"]
    assert wrapped.seen == [("openai/test", "LMServerError"), ("openai/test", ["Paris"])]
    assert recorder.told == [("start", "ResilientLM")] * 2 + [("end", "NoneType")] * 2


def test_callbacks_within_an_attempt_are_told():
    """Those of modules that a user's own engine runs on the way."""

    class Engine:
        def complete(self, request):
            inner = dspy.Predict("question -> answer")
            with dspy.context(lm=dspy.utils.DummyLM([{"answer": "inner"}])):
                inner(question="q")
            return dspy.lm15.Response(
                id="1", model="m", message=Message.assistant("outer"), finish_reason="stop",
                usage=dspy.lm15.Usage(),
            )  # fmt: skip

    recorder = Recorder()
    with ResilientLM("openai/inner", engine=Engine()) as lm, dspy.context(callbacks=[recorder]):
        assert lm("q") == ["outer"]
    assert [kind for what, kind in recorder.told if what == "start"] == ["ResilientLM", "DummyLM"]


def test_openinference_sees_each_attempt(spans, provider, make, ask):
    """A span for every request, with model, input and output, and the error of a failed one."""
    provider.script(Status(500))
    lm = make(retry=QUICK)
    assert ask(lm, "Capital of France?") == ["Paris"]
    failed, answered = of_lms(spans())
    assert (failed.status.is_ok, answered.status.is_ok) == (False, True)
    assert answered.attributes["llm.model_name"] == "test"
    assert "Capital of France?" in answered.attributes["input.value"]
    assert "Paris" in answered.attributes["output.value"]


def test_openinference_sees_programs(spans, provider, make, ask):
    """The span of a request lies below those of adapter and module."""
    provider.answer = dspy_answers({"q": "Paris"})
    with dspy.context(lm=make()):
        assert ask(dspy.Predict("question -> answer"), question="q").answer == "Paris"
    (mine,) = of_lms(spans())
    by_id = {each.context.span_id: each for each in spans()}
    assert by_id[mine.parent.span_id].name.startswith("ChatAdapter")


def test_openinference_sees_a_fallbacks_request(spans, provider, make, ask):
    """Under the model that was asked."""
    provider.script(Status(500))
    lm = make(fallbacks=["openai/other"], num_retries=0)
    assert ask(lm, "q") == ["Paris"]
    assert [each.attributes["llm.model_name"] for each in of_lms(spans())] == ["test", "other"]


def test_openinference_sees_a_typed_request(spans, make, ask):
    """As with `dspy.LM`."""
    asked = Request(model="openai/test", messages=(Message.user("q"),))
    assert ask(make(), asked).message.text == "Paris"
    assert len(of_lms(spans())) == 1


BEFORE = """
import sys
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from openinference.instrumentation.dspy import DSPyInstrumentor
exporter = InMemorySpanExporter()
tracers = TracerProvider()
tracers.add_span_processor(SimpleSpanProcessor(exporter))
if sys.argv[2] == "after":
    import dspy_resilient
DSPyInstrumentor().instrument(tracer_provider=tracers)
import asyncio, dspy, json
from dspy_resilient import ResilientLM
if sys.argv[3] == "switched":
    dspy.LM = ResilientLM
lm = dspy.LM("openai/test", api_base=sys.argv[1], api_key="k") if sys.argv[3] == "switched" else (
    ResilientLM("openai/test", api_base=sys.argv[1], api_key="k"))
lm("one"), asyncio.run(lm.acall("two"))
print(json.dumps([each.name for each in exporter.get_finished_spans()]))
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["by name", "switched"])
def test_installed_before_or_after_our_import(provider, when, how):
    """The order makes no difference."""
    pytest.importorskip("openinference.instrumentation.dspy")
    program = [sys.executable, "-c", BEFORE, provider.api_base, when, how]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["LM.__call__", "LM.acall"], done.stderr


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow's tracing of DSPy, at work for one test, into a folder of its own."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    with warnings.catch_warnings(action="ignore"):
        module = pytest.importorskip("mlflow")
        pytest.importorskip("mlflow.dspy", exc_type=ImportError)  # it needs pandas

        module.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
        before = dict(dspy.settings.config)
        module.dspy.autolog(silent=True)
        yield module
        module.dspy.autolog(disable=True, silent=True)
    dspy.configure(callbacks=before["callbacks"], track_usage=before["track_usage"])


@pytest.mark.filterwarnings("ignore")
def test_mlflow_shows_hits_attempts_and_who_answered(mlflow, provider, make, ask):
    """As attributes of the one span of a call, whose trace `autolog` keeps."""
    provider.script(Status(500))
    lm = make(retry=QUICK)
    seen = []
    for prompt in ("q", "q"):
        ask(lm, prompt)
        trace = mlflow.get_trace(mlflow.get_last_active_trace_id())
        (span,) = trace.data.spans
        assert span.name == "ResilientLM.__call__"
        seen.append({n: v for n, v in span.attributes.items() if n.startswith("dspy_resilient.")})
    target = lm.history[0]["attempts"][-1].target
    about = {"dspy_resilient.client": "openai/test", "dspy_resilient.target": target}
    assert seen == [
        about
        | {
            "dspy_resilient.cache_hit": False,
            "dspy_resilient.attempts": 2,
            "dspy_resilient.outcomes": [f"{target}: failure", f"{target}: answer"],
        },
        about
        | {
            "dspy_resilient.cache_hit": True,
            "dspy_resilient.attempts": 0,
            "dspy_resilient.outcomes": [],
        },
    ]
