"""Where a call can go: a `dspy.LM`, and the circuit, gate and limits on the way to it.

A `Target` is a `dspy.LM` as the user configured it. A `Route` is one way to a provider: model,
endpoint and credential. An `Attempt` is one request: it runs DSPy's own call method on a plain
twin of the target, sees what came of it, and settles permit, gate and slot exactly once. This
module decides nothing about order, retries or waiting; that is `call.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import cachetools
import dspy

from dspy_resilient import providers
from dspy_resilient.cache import Answer, request_key, tenant_of
from dspy_resilient.circuit import CircuitState, Kind, Outcome, classify, redacted
from dspy_resilient.errors import CircuitOpenError, DeadlineExceededError
from dspy_resilient.limits import Limiter, RetryBudget

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dspy_resilient.call import Call
    from dspy_resilient.circuit import CircuitBreaker, GatePass, Permit, Verdict
    from dspy_resilient.limits import Slot
    from dspy_resilient.runtime import Runtime

try:  # what an adapter of DSPy 3.4 sets to say that a messages= call is its own
    from dspy.clients._deprecation import _adapter_call, adapter_message_call
except ImportError:  # DSPy 3.5 has no such calls any more
    _adapter_call = adapter_message_call = None

# What a call may say about the connection. It belongs to the provider that the caller had in mind.
CONNECTION = frozenset(
    {
        "api_base",
        "api_key",
        "api_version",
        "azure_ad_token",
        "azure_ad_token_provider",
        "base_url",
        "custom_llm_provider",
        "extra_headers",
        "extra_query",
        "headers",
        "organization",
        "project",
    }
)

_sending: ContextVar[bool] = ContextVar("dspy_resilient_sending", default=False)

_AUTH_FAILURES = 3


def is_sending() -> bool:
    """Whether the caller runs inside an attempt of ours, and so may not wait for a flight."""
    return _sending.get()


def called_by_adapter(lm: object, messages: object) -> bool:
    """Whether one of DSPy's adapters has marked this very call as its own."""
    mark = _adapter_call.get() if _adapter_call is not None else None
    return mark is not None and mark[0] is lm and mark[1] is messages


class Admission:
    """Leave to send one attempt: the permit of the circuit, and that of the credential's own."""

    __slots__ = ("_access", "_permit", "_route")

    def __init__(self, route: Route, permit: Permit | None, access: Permit | None) -> None:
        self._route = route
        self._permit = permit
        self._access = access

    @property
    def probe(self) -> bool:
        """Whether the attempt is a probe of a half-open circuit."""
        return (self._permit is not None and self._permit.probe) or (
            self._access is not None and self._access.probe
        )

    def answered(self) -> None:
        """Report an answer."""
        if self._permit is not None:
            self._permit.success()
        if self._access is not None:
            self._access.success()

    def failed(self, verdict: Verdict, error: BaseException) -> None:
        """Report what `verdict` says, each circuit hearing only what concerns it."""
        if verdict.kind in (Kind.AUTH, Kind.BILLING):
            self._route.refuse_credential(self._access, verdict.kind, error)
        elif self._access is not None:
            self._access.neutral()
        if self._permit is None:
            return
        if verdict.outcome == Outcome.FAILURE and verdict.kind not in (Kind.AUTH, Kind.BILLING):
            self._permit.failure(redacted(error), retry_after=verdict.retry_after)
        else:
            self._permit.neutral()


class Route:
    """One way to a provider: a circuit per endpoint, and gate, limits and access per credential."""

    def __init__(
        self, runtime: Runtime, label: str, circuit: CircuitBreaker | None, budget: RetryBudget
    ) -> None:
        self.label = label
        self.circuit = circuit
        self.budget = budget
        self.access: CircuitBreaker | None = None
        self.gate = runtime.new_gate(label)
        self.limiter = (
            Limiter(runtime.limits, clock=runtime.clock, client=runtime.name, target=label)
            if runtime.limits is not None
            else None
        )
        self._runtime = runtime

    def admit(self) -> Admission | None:
        """Return leave to send one attempt, or None if a circuit refuses."""
        permit = None
        if self.circuit is not None:
            permit = self.circuit.try_admit()
            if permit is None:
                return None
        if self.access is None:
            return Admission(self, permit, None)
        access = self.access.try_admit()
        if access is None:
            if permit is not None:
                permit.neutral()
            return None
        return Admission(self, permit, access)

    def blocker(self) -> CircuitBreaker:
        """Return the circuit that refuses longest (the endpoint's own if none does)."""
        circuits = [c for c in (self.circuit, self.access) if c is not None]
        return max(circuits, key=lambda circuit: circuit.wait_time())

    def wait_time(self) -> float:
        """Return the seconds until `admit` may succeed; see `CircuitBreaker.wait_time`."""
        if self.circuit is None and self.access is None:
            return 0.0
        return self.blocker().wait_time()

    def rejection(self) -> CircuitOpenError:
        """Return a fresh error that says why this route is closed, and until when."""
        return self.blocker().rejection()

    def reset(self) -> None:
        """Close the circuits and open the gate."""
        if self.circuit is not None:
            self.circuit.reset()
        self.access = None
        self.gate = self._runtime.new_gate(self.label)

    def explain(self) -> str:
        """Return what state this route is in, why, and until when."""
        circuit = None if self.circuit is None and self.access is None else self.blocker()
        if circuit is None:
            says = f"{self.label} has no circuit"
        elif circuit.state == CircuitState.CLOSED:
            says = f"{self.label} answers; its circuit is closed"
            if circuit.failure_count:
                says += f" after {circuit.failure_count} failures in a row"
        else:
            left = circuit.wait_time()
            until = (
                f"for {left:.1f} s more" if math.isfinite(left) else "until a probe has answered"
            )
            says = f"{self.label}: the circuit is {circuit.state} ({circuit.reason}) {until}"
            if circuit.last_error:
                says += f"; last error: {circuit.last_error}"
        pause = self.gate.wait_time()
        if 0 < pause < math.inf:
            says += f"; throttled for {pause:.1f} s more"
        return says + "."

    def refuse_credential(self, permit: Permit | None, kind: Kind, error: BaseException) -> None:
        """Open the way for this credential alone: at once on billing, after 3 on auth (R26)."""
        if self.circuit is None:
            return
        if self.access is None:
            self.access = self._runtime.new_circuit(
                f"{self.label} ({kind})", failure_threshold=_AUTH_FAILURES
            )
        (permit or self.access.admit()).failure(redacted(error), reason=str(kind))


class Routes:
    """The routes of one client, made when first used; the least recently used go (R26)."""

    _MOST = 512

    def __init__(self, runtime: Runtime, shared: CircuitBreaker | None = None) -> None:
        self._runtime = runtime
        self._shared = shared
        self._lock = threading.Lock()
        self._routes: cachetools.LRUCache[tuple[Any, ...], Route] = cachetools.LRUCache(self._MOST)
        self._ways: cachetools.LRUCache[tuple[Any, ...], tuple[CircuitBreaker | None, RetryBudget]]
        self._ways = cachetools.LRUCache(self._MOST)

    def find(self, lm: Any, kwargs: dict[str, Any]) -> Route:
        """Return the route of a call with `kwargs` on `lm`."""
        endpoint, api_key = endpoint_of(lm, kwargs), setting("api_key", lm, kwargs)
        way = (lm.model, lm.model_type, endpoint)
        with self._lock:
            route = self._routes.get((way, api_key))
            if route is None:
                route = self._routes[way, api_key] = self._make(way)
            return route

    def _make(self, way: tuple[str, str, str]) -> Route:
        model, _, endpoint = way
        label = f"{model} at {endpoint}" if endpoint else model
        if way not in self._ways:
            runtime = self._runtime
            circuit = self._shared or (
                runtime.new_circuit(label) if runtime.circuit_policy else None
            )
            self._ways[way] = circuit, RetryBudget(runtime.retry.budget)
        circuit, budget = self._ways[way]
        return Route(self._runtime, label, circuit, budget)

    def all(self) -> list[Route]:
        """Return the routes in use."""
        with self._lock:
            return list(self._routes.values())

    def reset(self) -> None:
        """Bring every route back to its first state; the circuits stay the same objects."""
        for route in self.all():
            route.reset()


def setting(name: str, lm: Any, kwargs: dict[str, Any]) -> Any:
    """Return a call's setting: its own keyword, else the client's."""
    value = kwargs.get(name)
    return lm.kwargs.get(name) if value is None else value


def endpoint_of(lm: Any, kwargs: dict[str, Any]) -> str:
    """Return the endpoint a call goes to, or "" for the provider's own."""
    explicit = setting("api_base", lm, kwargs) or setting("base_url", lm, kwargs)
    if explicit is None:
        provider = lm.model.partition("/")[0].upper()
        explicit = os.environ.get(f"{provider}_API_BASE") or os.environ.get(f"{provider}_BASE_URL")
    return str(explicit).rstrip("/") if explicit else ""


@dataclasses.dataclass(slots=True, eq=False)
class Target:
    """One `dspy.LM` that calls may go to.

    Attributes:
        lm: The LM as configured.
        routes: The ways to its provider, shared with whoever lent the target.
        runtime: The client that makes the calls.
        kind: Class of the twin on which attempts run.
        history: Where DSPy records the calls (the caller's own list).
        own_connection: Whether per-call connection settings are meant for another provider.
    """

    lm: Any
    routes: Routes
    runtime: Runtime
    kind: type
    history: list[Any]
    own_connection: bool = False

    @property
    def label(self) -> str:
        """Return the model and endpoint, for people."""
        return self.routes.find(self.lm, {}).label

    def route(self, call: Call) -> Route:
        """Return the way this call takes."""
        return self.routes.find(self.lm, self.kwargs(call))

    def kwargs(self, call: Call) -> dict[str, Any]:
        """Return the call's keywords as this target should see them."""
        if not self.own_connection:
            return call.kwargs
        return {name: value for name, value in call.kwargs.items() if name not in CONNECTION}

    def key(self, call: Call) -> str | None:
        """Return the cache key of this call under this target, or None if it is not cached."""
        if call.key is None:
            return None
        return key_of(self.lm, call.args, self.kwargs(call), self.runtime.tenant)

    def estimate(self, call: Call) -> int:
        """Guess the tokens this call will use: 4 characters each, and the most it may answer."""
        kwargs = self.kwargs(call)
        prompt = str(
            kwargs.get("messages") or (call.args[0] if call.args else kwargs.get("prompt"))
        )
        answer = setting("max_tokens", self.lm, kwargs) or setting(
            "max_completion_tokens", self.lm, kwargs
        )
        return len(prompt) // 4 + (answer if isinstance(answer, int) else 256)

    def attempt(
        self, call: Call, route: Route, admission: Admission, passage: GatePass, slot: Slot | None
    ) -> Attempt:
        """Return one attempt, ready to be sent."""
        return Attempt(self, call, route, admission, passage, slot)


def key_of(
    lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tenant: str | None
) -> str | None:
    """Return the cache key of a call on `lm`, or None if it cannot be keyed (R41)."""
    prompt = args[0] if args else kwargs.get("prompt") or kwargs.get("request")
    request = prompt if isinstance(prompt, dspy.lm15.Request) else None
    settings = {**lm.kwargs, **kwargs}
    for name in ("prompt", "messages", "request"):
        settings.pop(name, None)
    return request_key(
        entry="call" if request is None else "request",
        model=lm.model,
        model_type=lm.model_type,
        endpoint=endpoint_of(lm, kwargs),
        tenant=tenant if tenant is not None else tenant_of(setting("api_key", lm, kwargs)),
        prompt=None if request is not None else prompt,
        messages=kwargs.get("messages"),
        kwargs=settings,
        request=request,
    )


class _CountingStream:
    """A consumer's stream that notices when the first chunk has gone out, or nobody is there."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.emitted = False

    async def send(self, item: Any) -> None:
        self.emitted = True
        await self._stream.send(item)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Attempt:
    """One request to one target.

    Attributes:
        target: Where it goes.
        call: Which call it belongs to.
        limit: Seconds it may take (what is left until the deadline), or inf.
        emitted: Whether a chunk has reached the consumer of a stream.
        seconds: How long it took, once it has ended.
    """

    def __init__(
        self,
        target: Target,
        call: Call,
        route: Route,
        admission: Admission,
        passage: GatePass,
        slot: Slot | None,
    ) -> None:
        self.target = target
        self.call = call
        self.seconds = 0.0
        self._route = route
        self._admission = admission
        self._passage = passage
        self._slot = slot
        self._clock = target.runtime.clock
        self._started = self._clock()
        self.limit = call.left(self._started)
        self._stream: _CountingStream | None = None
        self._record: dict[str, Any] | None = None
        self._verdict: Verdict | None = None
        self._left_behind = False
        self._discard = False
        self._settling = threading.Lock()

    @property
    def label(self) -> str:
        """Return the route's label."""
        return self._route.label

    @property
    def emitted(self) -> bool:
        """Whether a chunk has reached the consumer."""
        return self._stream is not None and self._stream.emitted

    def run(self) -> Answer:
        """Send the request on this thread and return the answer."""
        method, args, kwargs = self._prepare()
        with self._scope(args, kwargs) as twin:
            return self._answer(method(twin, *args, **kwargs))

    async def arun(self) -> Answer:
        """Send the request on the running loop and return the answer."""
        method, args, kwargs = self._prepare()
        with self._scope(args, kwargs) as twin:
            return self._answer(await method(twin, *args, **kwargs))

    def _prepare(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        self.target.runtime.tally.add("attempts")
        method = getattr(self.target.kind, self.call.method)
        args, kwargs = self.call.args, dict(self.target.kwargs(self.call))
        lm = self.target.lm
        if args and isinstance(args[0], dspy.lm15.Request) and args[0].model != lm.model:
            args = (dataclasses.replace(args[0], model=lm.model), *args[1:])
        return getattr(method, "__wrapped__", method), args, kwargs

    @contextlib.contextmanager
    def _scope(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        """Set up what DSPy and LiteLLM are to see during the attempt, and nothing beyond it."""
        with contextlib.ExitStack() as scope:
            token = _sending.set(True)
            scope.callback(_sending.reset, token)
            lm = self.target.lm
            keywords = {"model": lm.model, **lm.kwargs, **kwargs}
            watch = providers.watch(self._witness, self._by_keywords(args), keywords)
            tags = scope.enter_context(watch)
            twin = self._twin(tags)
            if settings := self._settings():
                scope.enter_context(dspy.context(**settings))
            messages = kwargs.get("messages")
            if adapter_message_call is not None and messages is not None:
                scope.enter_context(adapter_message_call(twin, messages))
            try:
                yield twin
            finally:
                del twin.update_history  # it holds the twin and the attempt in a cycle

    def _by_keywords(self, args: tuple[Any, ...]) -> bool:
        """Whether LiteLLM sees the keywords of this attempt: not through another engine."""
        typed = bool(args) and isinstance(args[0], dspy.lm15.Request)
        return getattr(self.target.lm, "engine", None) == "litellm" and not typed

    def _twin(self, tags: dict[str, Any]) -> Any:
        """Return a plain copy of the target for one request: no cache, no retries, no callbacks."""
        lm = self.target.lm
        twin = object.__new__(self.target.kind)
        twin.__dict__.update(lm.__dict__)
        twin.cache = False
        twin.num_retries = 0
        twin.callbacks = []
        twin.history = self.target.history
        twin.update_history = functools.partial(self._take_record, twin)
        if tags:
            twin.kwargs = {**lm.kwargs, **tags}
        return twin

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if self.call.streams:
            self._stream = settings["send_stream"] = _CountingStream(dspy.settings.send_stream)
        if dspy.settings.disable_history:
            settings["disable_history"] = False  # the entry tells whether the answer is complete
            self._discard = True
        return settings

    def _take_record(self, twin: Any, entry: dict[str, Any]) -> None:
        """Receive DSPy's history entry, complete it, and pass it on to DSPy."""
        self._record = entry
        if self._discard:
            return
        entry["kwargs"] = {
            name: value for name, value in self.call.kwargs.items() if _goes_on_record(name)
        }
        entry["attempts"] = self.call.attempts
        self.target.kind.update_history(twin, entry)

    def _answer(self, outputs: Any) -> Answer:
        if isinstance(outputs, list) and not outputs:
            raise dspy.LMServerError(
                "the provider answered without a single choice", model=self.target.lm.model
            )
        return Answer.of(outputs, self._record, target=self._route.label, stored_at=self._clock())

    def succeed(self) -> None:
        """Report the answer to circuit, gate, budget and limits."""
        self.seconds = self._clock() - self._started
        self._admission.answered()
        self._passage.answered()
        self._route.budget.refund()
        if self._slot is not None:
            self._slot.leave(tokens=_tokens(self._record))

    def settle(self, error: BaseException) -> Verdict:
        """Return the verdict on `error`, reporting it the first time; later calls change nothing."""
        return self._settle(error, None)

    def _witness(self, evidence: providers.Evidence) -> None:
        """Hear of a failure from LiteLLM, before the caller does (R30)."""
        if evidence.error is not None:
            self._settle(evidence.error, evidence.handed_off)

    def _settle(self, error: BaseException, handed_off: bool | None) -> Verdict:
        with self._settling:
            if self._verdict is not None:
                return self._verdict
            self.seconds = self._clock() - self._started
            self._verdict = verdict = self._judge(error, handed_off)
        if not self._left_behind or verdict.outcome == Outcome.FAILURE:
            self._report(verdict, error)
        return verdict

    def _judge(self, error: BaseException, handed_off: bool | None = None) -> Verdict:
        timeout = setting("timeout", self.target.lm, self.call.kwargs)
        return classify(
            error,
            seconds=self.seconds,
            timeout=timeout if isinstance(timeout, (int, float)) else None,
            handed_off=handed_off,
        )

    def _report(self, verdict: Verdict, error: BaseException) -> None:
        self._admission.failed(verdict, error)
        throttled = verdict.kind is Kind.THROTTLED
        if throttled or (verdict.kind is Kind.FAILURE and verdict.retry_after is not None):
            self._passage.throttled(verdict.retry_after)
        else:
            self._passage.release()
        if self._slot is not None:
            self._slot.leave(throttled=throttled, ok=False)

    def leave_behind(self) -> DeadlineExceededError:
        """Return the error for a caller who gives up while the request goes on (R54).

        Permit, gate and slot stay taken until the request has ended, unless it has run long
        enough to count as a failure already.
        """
        self._left_behind = True
        return self.out_of_time()

    def arrive_late(self, answer: Answer) -> None:
        """Report an answer whose caller has given up, and keep it for the next one."""
        self.succeed()
        self.target.runtime.store(self.target.key(self.call), answer)

    def fail_late(self, error: BaseException) -> None:
        """Report a failure whose caller has given up."""
        self.seconds = self._clock() - self._started
        self._report(self._judge(error), error)

    def out_of_time(self) -> DeadlineExceededError:
        """Return the error of an attempt that was under way when the deadline passed."""
        name = self.target.runtime.name
        return DeadlineExceededError(
            f"client {name!r}: no answer within the deadline of {self.call.budget:g} s; "
            f"{self._route.label} was still being waited for",
            client=name,
        )


def _goes_on_record(name: str) -> bool:
    return not name.startswith("api_") and name not in ("prompt", "messages", "request")


def _tokens(record: dict[str, Any] | None) -> int | None:
    total = ((record or {}).get("usage") or {}).get("total_tokens")
    return total if isinstance(total, int) and math.isfinite(total) else None
