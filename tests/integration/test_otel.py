"""Spans and metrics as the real SDK exports them."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys

import dspy
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from dspy_resilient import CircuitOpenError, DeadlineExceededError, RetryPolicy
from dspy_resilient.observe.otel import instrument
from dspy_resilient.testing import Hang, Hold, Provider, Status

QUICK = RetryPolicy(base=0.0)


class Collected:
    """An SDK with everything in memory."""

    def __init__(self):
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.traces = TracerProvider(shutdown_on_exit=False)
        self.traces.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracer = self.traces.get_tracer("the user's own")

    def watch(self, *clients):
        return instrument(*clients, tracer_provider=self.traces, meter_provider=self.meters)

    @property
    def spans(self):
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time)

    def tree(self):
        """The finished spans by name, each with those below it."""
        below = {}
        for span in self.spans:
            below.setdefault(span.parent and span.parent.span_id, []).append(span)

        def grow(parent):
            return [(span.name, grow(span.context.span_id)) for span in below.get(parent, [])]

        return grow(None)

    def metrics(self):
        """Every point: {(metric, sorted attribute values): point}."""
        data = self.reader.get_metrics_data()
        return {
            (metric.name, *sorted(map(str, point.attributes.values()))): point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }


@pytest.fixture
def collected():
    """An SDK of the test's own; the global one is not touched."""
    found = Collected()
    yield found
    found.traces.shutdown()
    found.meters.shutdown()


def test_a_call_with_a_retry_a_fallback_a_hit_and_a_rejection(collected, make, provider, ask):
    """Spans two deep under the active one, with what happened on the way."""
    lm = make(name="fast", retry=RetryPolicy(max_attempts=2, base=0.0), fallbacks=["openai/other"])
    with collected.watch(lm), collected.tracer.start_as_current_span("program"):
        provider.script(Status(503), None)
        ask(lm, "retried")
        provider.script(Status(503), Status(503), None)
        ask(lm, "fallen back")
        ask(lm, "retried")
        lm.circuit.force_open()
        ask(lm, "rejected by the first")
    chat = "chat test"
    attempt = ("attempt", [])
    assert collected.tree() == [
        (
            "program",
            [(chat, [attempt] * 2), (chat, [attempt] * 3), (chat, []), (chat, [attempt])],
        )
    ]
    retried, fallen, hit, rejected = (span for span in collected.spans if span.name == chat)
    assert [event.name for event in retried.events] == ["dspy_resilient.retry_scheduled"]
    assert [event.name for event in fallen.events] == [
        "dspy_resilient.retry_scheduled",
        "dspy_resilient.fell_back",
    ]
    assert [event.name for event in rejected.events] == [
        "dspy_resilient.call_rejected",
        "dspy_resilient.fell_back",
    ]
    assert rejected.events[0].attributes["dspy_resilient.reason"] == "circuit_open"
    assert not hit.events
    assert [s.attributes["dspy_resilient.cache_hit"] for s in (retried, hit)] == [False, True]
    assert [s.attributes["dspy_resilient.attempts"] for s in (retried, fallen, hit)] == [2, 3, 0]
    assert fallen.attributes["dspy_resilient.target"].startswith("openai/other at ")
    assert all(span.status.status_code == StatusCode.UNSET for span in (retried, fallen, hit))


def test_a_call_has_the_attributes_of_the_conventions(collected, make, ask):
    """Operation, provider, models, settings, usage, finish reasons; no prompt and no answer."""
    lm = make(temperature=0.5, max_tokens=100, api_key="sk-not-to-be-shown-0123456789")
    with collected.watch(lm):
        ask(lm, "a secret question", n=2)
    attempt, call = sorted(collected.spans, key=lambda span: span.name)
    assert (call.name, call.kind) == ("chat test", SpanKind.CLIENT)
    assert {
        "dspy_resilient.client": "openai/test",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "test",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 100,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("stop", "stop"),
    }.items() <= call.attributes.items()
    for name in ("response.model", "response.id", "usage.input_tokens", "usage.output_tokens"):
        assert call.attributes[f"gen_ai.{name}"]
    assert attempt.attributes["dspy_resilient.target"] == lm._primary.label
    text = "".join(span.to_json() for span in collected.spans)
    for secret in ("secret question", "Paris", "sk-not"):
        assert secret not in text


def test_an_error_is_named_and_not_told(collected, make, provider, ask):
    """Its class and status; a provider's message may hold a prompt."""
    lm = make(retry=RetryPolicy(max_attempts=1))
    provider.script(Status(503, body='{"error": {"message": "you asked: what is my password"}}'))
    with collected.watch(lm), pytest.raises(dspy.LMServerError):
        ask(lm, "a")
    for span in collected.spans:
        assert span.status.status_code == StatusCode.ERROR
        assert span.attributes["error.type"] == "LMServerError"
        assert span.attributes["http.response.status_code"] == 503
    assert "password" not in "".join(span.to_json() for span in collected.spans)


def test_a_rejected_call_is_a_failed_span_without_an_attempt(collected, make, ask):
    """Nothing was sent."""
    lm = make(max_wait=0)
    lm.circuit.force_open()
    with collected.watch(lm), pytest.raises(CircuitOpenError):
        ask(lm, "a")
    (span,) = collected.spans
    assert span.attributes["error.type"] == "CircuitOpenError"


def test_each_task_and_thread_has_a_parent_of_its_own(collected, make, provider):
    """Calls that overlap on one loop do not get mixed up."""
    lm, gate = make(cache=False), Hold()
    provider.always(gate)

    async def one(number):
        with collected.tracer.start_as_current_span(f"task {number}"):
            await lm.acall(str(number))

    async def main():
        tasks = [asyncio.create_task(one(number)) for number in range(5)]
        await asyncio.to_thread(provider.wait_for, 5)
        gate.release()
        await asyncio.gather(*tasks)

    with collected.watch(lm):
        asyncio.run(main())
    assert sorted(collected.tree()) == [
        (f"task {number}", [("chat test", [("attempt", [])])]) for number in range(5)
    ]


def test_the_attempt_is_active_while_it_runs(collected, make, provider, ask, monkeypatch):
    """Spans of whatever sends the request lie below it."""
    lm = make()

    def answer(_):
        return "Paris"

    provider.answer = answer
    seen = []
    original = dspy.LM.update_history

    def update_history(self, entry):
        seen.append(trace.get_current_span().name)
        return original(self, entry)

    monkeypatch.setattr(dspy.LM, "update_history", update_history)
    with collected.watch(lm):
        ask(lm, "a")
    assert seen == ["attempt"]
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_cancelled_call_ends_its_spans(collected, make, provider):
    """Both, and the context is clean afterwards."""
    lm = make()
    provider.always(Hold())

    async def main():
        task = asyncio.create_task(lm.acall("a"))
        await asyncio.to_thread(provider.wait_for, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with collected.watch(lm):
        asyncio.run(main())
    assert collected.tree() == [("chat test", [("attempt", [])])]
    assert {span.attributes["error.type"] for span in collected.spans} == {"CancelledError"}


def test_a_deadline_keeps_the_attempt_below_its_call(collected, make, provider, ask):
    """Though a sync attempt under a deadline runs on a thread of its own."""
    lm = make(deadline=0.4)
    with collected.watch(lm):
        assert ask(lm, "a") == ["Paris"]
        provider.script(Hang(0.8))
        with pytest.raises(DeadlineExceededError):
            ask(lm, "b")
    first, *others = collected.tree()
    assert first == ("chat test", [("attempt", [])])
    assert others[0][0] == "chat test"


def test_metrics_of_calls_attempts_and_tokens(collected, make, provider, ask):
    """Durations by outcome, tokens by kind; a hit says nothing about the model."""
    lm = make(name="fast", retry=QUICK)
    provider.script(Status(503), None)
    with collected.watch(lm):
        ask(lm, "a")
        ask(lm, "a")
        found = collected.metrics()
    assert found["gen_ai.client.operation.duration", "chat", "openai", "test"].count == 1
    label = lm._primary.label
    assert found[("dspy_resilient.attempt.duration", *sorted(("fast", label)))].count == 1
    failed = ("dspy_resilient.attempt.duration", *sorted(("LMServerError", "fast", label)))
    assert found[failed].count == 1
    for kind in ("input", "output"):
        key = ("gen_ai.client.token.usage", *sorted(("chat", kind, "openai", "test")))
        assert found[key].sum > 0


def test_metrics_of_counters_and_circuits(collected, make, ask):
    """The numbers of `stats()` and the states, read when they are collected."""
    lm = make(name="fast")
    with collected.watch(lm):
        ask(lm, "a")
        ask(lm, "a")
        lm.circuit.trip()
        found = collected.metrics()
        assert found["dspy_resilient.calls", "fast"].value == 2
        assert found["dspy_resilient.hits", "fast"].value == 1
        assert found["dspy_resilient.tokens_saved", "fast"].value > 0
        states = {
            key[-1] if key[-1] != lm._primary.label else key[-2]: point.value
            for key, point in found.items()
            if key[0] == "dspy_resilient.circuit.state"
        }
        assert {state for state, value in states.items() if value} == {"open"}
        assert len(states) == 5
    assert ("dspy_resilient.calls", "fast") not in collected.metrics()


def test_a_client_that_is_gone_is_not_kept_alive(collected, provider):
    """Meters live as long as the process; clients need not."""
    from dspy_resilient import ResilientLM

    lm = ResilientLM("openai/test", name="gone", api_base=provider.api_base, api_key="k")
    telemetry = collected.watch(lm)
    lm("a")
    assert ("dspy_resilient.calls", "gone") in collected.metrics()
    del lm
    gc.collect()
    assert ("dspy_resilient.calls", "gone") not in collected.metrics()
    telemetry.close()


def test_closing_ends_it(collected, make, ask):
    """Twice does no harm, and a client that reports elsewhere meanwhile goes on doing so."""
    lm, other = make(), Collected()
    first = collected.watch(lm)
    second = other.watch(lm)
    first.close()
    first.close()
    ask(lm, "a")
    second.close()
    ask(lm, "b")
    assert collected.spans == []
    assert len(other.spans) == 2


def test_copies_are_traced_too(collected, make, ask):
    """A rollout is the same client."""
    lm = make()
    with collected.watch(lm):
        ask(lm.copy(temperature=1.0), "a")
    assert len(collected.spans) == 2


def test_a_broken_span_processor_breaks_no_call(collected, make, ask, caplog):
    """Somebody's bug must not become an outage; it is logged once."""

    class Broken(SpanProcessor):
        def on_start(self, span, parent_context=None):
            raise ValueError("start")

        def on_end(self, span):
            raise ValueError("end")

    collected.traces.add_span_processor(Broken())
    lm = make()
    with collected.watch(lm):
        assert ask(lm, "a") == ["Paris"]
        assert ask(lm, "b") == ["Paris"]
    assert [r.getMessage() for r in caplog.records] == ["dspy_resilient.telemetry_failed"]


def test_a_stream_is_one_span(collected, make):
    """From request to its last chunk."""
    lm = make()
    program = dspy.streamify(dspy.Predict("question -> answer"))

    async def main():
        with dspy.context(lm=lm):
            return [chunk async for chunk in program(question="a")]

    with Provider() as provider, collected.watch(lm):
        lm.kwargs["api_base"] = provider.api_base
        asyncio.run(main())
    call = next(span for span in collected.spans if span.name == "chat test")
    assert call.attributes["gen_ai.request.stream"] is True
    assert call.attributes["dspy_resilient.attempts"] == 1


@pytest.mark.parametrize(
    ("model", "provider_name", "model_name"),
    [
        ("azure/gpt-4o", "azure.ai.openai", "gpt-4o"),
        ("bedrock/anthropic.claude", "aws.bedrock", "anthropic.claude"),
        ("openrouter/anthropic/claude", "openrouter", "anthropic/claude"),
        ("local", None, "local"),
    ],
)
def test_providers_have_the_names_of_the_conventions(
    collected, make, model, provider_name, model_name
):
    """LiteLLM's prefix is not always the conventions' name."""
    lm = make(model, max_wait=0)
    lm.circuit.force_open()
    with collected.watch(lm), pytest.raises(CircuitOpenError):
        lm("a")
    (span,) = collected.spans
    assert span.attributes.get("gen_ai.provider.name") == provider_name
    assert span.attributes["gen_ai.request.model"] == model_name


def test_it_is_loaded_only_when_asked_for():
    """`import dspy_resilient` needs no OpenTelemetry."""
    code = (
        "import sys, dspy; before = 'opentelemetry.trace' in sys.modules; import dspy_resilient; "
        "raise SystemExit('opentelemetry.trace' in sys.modules and not before)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
