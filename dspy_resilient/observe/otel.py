"""OpenTelemetry: a span for each call and attempt, and metrics; nothing is loaded until asked for.

    from dspy_resilient.observe.otel import instrument

    telemetry = instrument(lm)
    ...
    telemetry.close()

Needs the extra `otel`, and an SDK that you set up. Neither prompts nor answers are recorded.

A call is one span "chat MODEL" under the span that is active where it is made, with the attributes
that the semantic conventions for generative AI give it, and as span events what happened on the way:
rejections, pauses, fallbacks. Each request is a span "attempt" below it, active while it runs, so
that spans of HTTP instrumentation lie below the attempt they belong to.

Metrics: `gen_ai.client.operation.duration`, `gen_ai.client.token.usage`,
`dspy_resilient.attempt.duration`, `dspy_resilient.circuit.state`, and the counters of `metrics.py`
as `dspy_resilient.NAME`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider

from dspy_resilient import events
from dspy_resilient.observe.metrics import COUNTERS, Counter, circuit_states, runtimes, totals

if TYPE_CHECKING:
    from dspy_resilient.lm import ResilientLM
    from dspy_resilient.pipeline.attempt import Attempt
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.state import Call


# How LiteLLM and the conventions call the same provider, where they differ.
_PROVIDERS = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
_SETTINGS = (
    *("temperature", "top_p", "top_k", "max_tokens", "seed"),
    *("frequency_penalty", "presence_penalty"),
)
_USAGE = {
    "input": ("prompt_tokens", "input_tokens"),
    "output": ("completion_tokens", "output_tokens"),
}


def _operation(lm: Any) -> dict[str, str]:
    """Return what a call of `lm` is: its kind, its provider, and the model asked for."""
    provider, slash, model = lm.model.partition("/")
    about = {
        "gen_ai.operation.name": "text_completion" if lm.model_type == "text" else "chat",
        "gen_ai.request.model": model if slash else lm.model,
    }
    if slash:
        about["gen_ai.provider.name"] = _PROVIDERS.get(provider, provider)
    return about


def _settings(call: Call) -> dict[str, Any]:
    """Return what the request asks for, as far as it is plain numbers."""
    asked = {**call.targets[0].lm.kwargs, **call.kwargs}
    told: dict[str, Any] = {
        f"gen_ai.request.{name}": asked[name]
        for name in _SETTINGS
        if isinstance(asked.get(name), (int, float))
    }
    if isinstance(asked.get("n"), int) and asked["n"] > 1:
        told["gen_ai.request.choice.count"] = asked["n"]
    if call.streams:
        told["gen_ai.request.stream"] = True
    return told


def _response(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what came back, from DSPy's history entry: model, id and why it ended."""
    answer = record.get("response")
    choices = getattr(answer, "choices", None) or ()
    reasons = [str(reason) for each in choices if (reason := getattr(each, "finish_reason", None))]
    told = {
        "gen_ai.response.model": record.get("response_model"),
        "gen_ai.response.id": getattr(answer, "id", None),
        "gen_ai.response.finish_reasons": reasons,
    }
    return {name: value for name, value in told.items() if value}


def _usage(record: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of an answer, "input" and "output", as far as they are known."""
    told = record.get("usage") or {}
    found = {
        kind: next((told[name] for name in names if isinstance(told.get(name), int)), None)
        for kind, names in _USAGE.items()
    }
    return {kind: tokens for kind, tokens in found.items() if tokens is not None}


_SCOPE = "dspy_resilient"
_SECONDS = [0.01 * 2**step for step in range(14)]
_TOKENS = [4**step for step in range(14)]
_ON_THE_WAY = (
    events.CallQueued,
    events.CallRejected,
    events.FellBack,
    events.FlightJoined,
    events.RetryScheduled,
    events.WaitStarted,
)


def instrument(
    *clients: ResilientLM | Iterable[ResilientLM],
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Telemetry:
    """Begin to report what these clients, and so their copies, do.

    Args:
        *clients: Each a `ResilientLM` or a collection of them. They are held weakly.
        tracer_provider: Where spans go. None (default): the global provider.
        meter_provider: Where metrics go. None (default): the global provider.

    Returns:
        What ends it. A client reports to one place: to whoever asked last.

    Raises:
        TypeError: If one is neither a `ResilientLM` nor a collection of them.
    """
    tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
    meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
    return Telemetry(runtimes(clients), tracer, meter)


class Telemetry:
    """The reporting of some clients, until `close()` or the end of a `with` block."""

    def __init__(self, found: list[ClientState], tracer: trace.Tracer, meter: Meter) -> None:
        self._runtimes = weakref.WeakSet(found)
        self._reporter = _Reporter(tracer, meter)
        for runtime in found:
            runtime.trace(self._reporter)
        for counter in COUNTERS:
            meter.create_observable_counter(
                f"dspy_resilient.{counter.name}", [self._counted(counter)], "1", counter.meaning
            )
        meter.create_observable_gauge(
            "dspy_resilient.circuit.state",
            [self._circuits],
            "1",
            "1 for the state that the circuit is in, 0 for the others.",
        )

    def close(self) -> None:
        """Report no more. Idempotent."""
        for runtime in list(self._runtimes):
            if runtime.tracer is self._reporter:
                runtime.trace(None)
        self._runtimes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _counted(self, counter: Counter) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            for name, stats in totals(list(self._runtimes)).items():
                for part, value in counter.samples(stats):
                    yield Observation(value, {"dspy_resilient.client": name, **part})

        return observe

    def _circuits(self, _: CallbackOptions) -> Iterator[Observation]:
        for (name, target), current in circuit_states(list(self._runtimes)).items():
            for state in type(current):
                yield Observation(
                    int(state == current),
                    {
                        "dspy_resilient.client": name,
                        "dspy_resilient.target": target,
                        "dspy_resilient.circuit.state": str(state),
                    },
                )


class _Reporter:
    """Follows calls on the thread or task that makes them: the call's span is the active one."""

    def __init__(self, tracer: trace.Tracer, meter: Meter) -> None:
        self._tracer = tracer
        self._faulty = False
        self._operations = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "GenAI operation duration.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._attempts = meter.create_histogram(
            "dspy_resilient.attempt.duration",
            "s",
            "Duration of one request.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )

    @contextlib.contextmanager
    def call(self, call: Call) -> Iterator[None]:
        target = call.targets[0]
        about = _operation(target.lm)
        name = f"{about['gen_ai.operation.name']} {about['gen_ai.request.model']}"
        clock, outcome = target.client.clock, dict(about)
        started = clock()
        try:
            client = {"dspy_resilient.client": target.client.name}
            with self._span(name, SpanKind.CLIENT, client | about | _settings(call)):
                yield
        except BaseException as error:
            outcome["error.type"] = type(error).__name__
            raise
        finally:
            if call.attempts or "error.type" in outcome:  # a hit says nothing about the model
                self._operations.record(clock() - started, outcome)

    @contextlib.contextmanager
    def attempt(self, attempt: Attempt) -> Iterator[None]:
        parent, client = trace.get_current_span(), attempt.client
        target = {"dspy_resilient.target": attempt.label}
        facts = target | {"dspy_resilient.probe": attempt.probe}
        started = client.clock()
        try:
            with self._span("attempt", SpanKind.INTERNAL, facts):
                yield
        except BaseException as error:
            target["error.type"] = type(error).__name__
            raise
        finally:
            about = {"dspy_resilient.client": client.name} | target
            self._attempts.record(client.clock() - started, about)
        self._answered(parent, attempt)

    def note(self, event: events.Event) -> None:
        span = trace.get_current_span()
        if isinstance(event, events.CallFinished):
            span.set_attribute("dspy_resilient.cache_hit", event.cache_hit)
            span.set_attribute("dspy_resilient.attempts", event.attempts)
        elif isinstance(event, events.CacheHit):
            span.set_attribute("dspy_resilient.stale", event.stale)
        elif isinstance(event, _ON_THE_WAY):
            span.add_event(events.name_of(event), _facts(event))

    def _answered(self, span: Span, attempt: Attempt) -> None:
        """Tell the span of the call, and the metrics, what came back."""
        about = _operation(attempt.target.lm)
        span.set_attribute("dspy_resilient.target", attempt.label)
        span.set_attributes(_response(attempt.record))
        for kind, tokens in _usage(attempt.record).items():
            span.set_attribute(f"gen_ai.usage.{kind}_tokens", tokens)
            self._tokens.record(tokens, about | {"gen_ai.token.type": kind})

    @contextlib.contextmanager
    def _span(self, name: str, kind: SpanKind, facts: Mapping[str, Any]) -> Iterator[None]:
        start = self._tracer.start_span
        span = self._safely(start, name, kind=kind, attributes=facts) or trace.INVALID_SPAN
        quiet = {"record_exception": False, "set_status_on_exception": False}  # it may be secret
        try:
            with trace.use_span(span, **quiet):
                yield
        except BaseException as error:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", type(error).__name__)
            if isinstance(status := getattr(error, "status", None), int):
                span.set_attribute("http.response.status_code", status)
            raise
        finally:
            self._safely(span.end)

    def _safely(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what may run somebody else's span processor, whose fault must not become an outage."""
        try:
            return act(*args, **kwargs)
        except Exception:  # noqa: BLE001  # whatever it is
            if not self._faulty:
                self._faulty = True
                events.logger.exception("dspy_resilient.telemetry_failed")


def _facts(event: events.Event) -> dict[str, Any]:
    found = {each.name: getattr(event, each.name) for each in fields(event)}
    return {
        f"dspy_resilient.{name}": value
        for name, value in found.items()
        if value is not None and name not in ("client", "at")
    }
