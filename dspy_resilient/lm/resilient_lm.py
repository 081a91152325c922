"""`ResilientLM`: what DSPy sees.

A `dspy.LM` whose public call methods go through `call.complete`. Everything else is inherited:
this module adds construction, copies, saved state and the user's own methods, and leaves to
`call.py` what happens to a call.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any, Self, TypeVar

import dspy
from dspy.utils.callback import with_callbacks

from dspy_resilient._support.closable import ClosedAtEnd
from dspy_resilient.cache import disk_folder, tenant_of
from dspy_resilient.events import CallFinished
from dspy_resilient.lm.history import entry_of_hit
from dspy_resilient.lm.options import (
    FALLBACKS,
    UNSET,
    Options,
    build_options,
    check_call_options,
    refuse_ours,
    refuse_stream,
    refuse_to_copy,
)
from dspy_resilient.lm.saving import (
    STATE_KEY,
    TRAINING,
    check_credentials,
    clean_state,
    dump_options,
    load_options,
    savable,
)
from dspy_resilient.pipeline import drivers as drive
from dspy_resilient.pipeline.attempt import called_by_adapter, is_sending
from dspy_resilient.pipeline.call import complete
from dspy_resilient.pipeline.client import ClientState
from dspy_resilient.pipeline.health import Health, health_of
from dspy_resilient.pipeline.in_flight import InFlight
from dspy_resilient.pipeline.state import Call, Served
from dspy_resilient.policies import CachePolicy, number
from dspy_resilient.stats.stats import Stats
from dspy_resilient.targets.fallbacks import Fallbacks
from dspy_resilient.targets.route import endpoint_of, setting
from dspy_resilient.targets.target import Target, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dspy_resilient.circuit import CircuitBreaker
    from dspy_resilient.events import Listener
    from dspy_resilient.policies import CircuitPolicy, LimitPolicy, RetryPolicy

_ME = "ResilientLM"
_Method = TypeVar("_Method", bound="Callable[..., Any]")


def _with_callbacks(method: _Method) -> _Method:
    """Have a call method tell the user's DSPy callbacks what DSPy's own would, and keep its type."""
    dspys = inspect.signature(getattr(dspy.LM, method.__name__))
    method.__signature__ = dspys  # type: ignore[attr-defined]  # what `inspect` looks for first
    decorated: _Method = with_callbacks(method)
    return decorated


class ResilientLM(ClosedAtEnd, dspy.LM):
    """A `dspy.LM` with a cache, a circuit breaker, retries, limits and fallbacks of its own.

    Takes every argument of `dspy.LM`, in the same order and with the same meaning, and can be used
    wherever one can. A new instance shares nothing with any other; `copy()` and `deepcopy()` are
    the same client. Safe for threads, event loops and forks. A cancelled call leaves nothing
    behind.

    Args:
        model: As for `dspy.LM`, e.g. "openai/gpt-4o-mini".
        model_type: As for `dspy.LM`.
        temperature: As for `dspy.LM`.
        max_tokens: As for `dspy.LM`.
        cache: True (default), False, or a `CachePolicy`. The attribute `cache` stays a bool.
        callbacks: As for `dspy.LM`.
        num_retries: As for `dspy.LM`: attempts after the first. Short for
            `retry=RetryPolicy(max_attempts=num_retries + 1)`. Default 3.
        provider: As for `dspy.LM`.
        finetuning_model: As for `dspy.LM`.
        launch_kwargs: As for `dspy.LM`.
        train_kwargs: As for `dspy.LM`.
        use_developer_role: As for `dspy.LM`.
        engine: As for `dspy.LM`, but "litellm" by default ("auto" if `prompt_cache` is given).
        async_engine: As for `dspy.LM`.
        prompt_cache: As for `dspy.LM`.
        name: Name in errors, events, logs and metrics. Default: the model.
        circuit: True (default), False, a `CircuitPolicy`, or a `CircuitBreaker` to share.
        max_wait: Seconds a call may wait for an open circuit, unless it was forced open without
            end. 0 fails fast; default 15.
        retry: A `RetryPolicy`.
        limits: A `LimitPolicy`, or an int: the most attempts at a time. Default None: no limit.
        fallbacks: Where a call goes when the primary cannot answer, in order: model names,
            `dspy.LM`s, `ResilientLM`s, or dicts of `dspy.LM` arguments. What one of them cannot do
            (tools, structured output, reasoning) programs do without, so that it may answer any
            call; the log says so when a program first asks, since only LiteLLM knows.
        context_window_fallbacks: Where a call goes whose prompt is too long for a model, in the
            same forms. If none of them answers, ContextWindowExceededError is raised as it was.
        policy_fallbacks: Where a call goes that a content filter refuses, or whose answer it holds
            back, in the same forms. If none does better, error or answer stay as they were.
        deadline: Seconds for the whole call, waits and retries included. Default None: no limit.
        on_event: Called with every event (see `events`), in order; its errors are logged once.
        shared: Where clients of the same name share their circuits and retry budgets, with the same
            `api_key` the pause after a 429 and the `rpm` and `tpm` of their limits, and with
            `CachePolicy(shared=True)` their answers: the address of a Redis or Valkey server
            ("redis://", "rediss://" or "valkey://", `?namespace=` keeps environments apart), a
            client for one, or a `shared.Store`. Default None: nothing is shared.
        **kwargs: Provider settings, as for `dspy.LM`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; the message names it, the value and the range.
    """

    def __init__(
        self,
        model: str,
        model_type: str = "chat",
        temperature: float | None = None,
        max_tokens: int | None = None,
        cache: bool | CachePolicy = True,
        callbacks: list[Any] | None = None,
        num_retries: int = UNSET,
        provider: Any = None,
        finetuning_model: str | None = None,
        launch_kwargs: dict[str, Any] | None = None,
        train_kwargs: dict[str, Any] | None = None,
        use_developer_role: bool = False,
        engine: Any = UNSET,
        async_engine: Any = None,
        prompt_cache: Any = None,
        *,
        name: str | None = None,
        circuit: bool | CircuitPolicy | CircuitBreaker = True,
        max_wait: float = 15.0,
        retry: RetryPolicy | None = None,
        limits: LimitPolicy | int | None = None,
        fallbacks: Sequence[str | dict[str, Any] | dspy.BaseLM] | None = (),
        context_window_fallbacks: Sequence[str | dict[str, Any] | dspy.BaseLM] | None = (),
        policy_fallbacks: Sequence[str | dict[str, Any] | dspy.BaseLM] | None = (),
        deadline: float | None = None,
        on_event: Listener | None = None,
        shared: Any = None,
        **kwargs: Any,
    ) -> None:
        refuse_stream(kwargs)
        check_call_options(max_wait=max_wait, deadline=deadline)
        options = build_options(
            model=model,
            name=name,
            cache=cache,
            circuit=circuit,
            retry=retry,
            num_retries=num_retries,
            limits=limits,
            on_event=on_event,
            shared=shared,
        )
        if engine is UNSET:
            engine = "litellm" if prompt_cache is None else "auto"
        super().__init__(
            model=model,
            model_type=model_type,
            temperature=temperature,
            max_tokens=max_tokens,
            cache=cache is not False,
            callbacks=callbacks,
            num_retries=options.retry.max_attempts - 1,
            provider=provider,
            finetuning_model=finetuning_model,
            launch_kwargs=launch_kwargs,
            train_kwargs=train_kwargs,
            use_developer_role=use_developer_role,
            engine=engine,
            async_engine=async_engine,
            prompt_cache=prompt_cache,
            **kwargs,
        )
        self.max_wait = max_wait
        self.deadline = deadline
        self._given_name = name
        self._dropped: tuple[str, ...] = ()
        given = (fallbacks, context_window_fallbacks, policy_fallbacks)
        self._start(options, dict(zip(FALLBACKS, given, strict=True)))

    def _start(self, options: Options, fallbacks: dict[str, Any]) -> None:
        """Make the shared part: empty cache, closed circuits."""
        self._runtime = ClientState(options, folder=self._folder(options.cache))
        self._primary = Target(self, self._runtime.routes, self._runtime, dspy.LM, self.history)
        self._fallbacks = Fallbacks.build(self, self._runtime, fallbacks)
        self._is_rebuilt = False
        policy = self._runtime.circuit_policy
        if policy is not None and policy.listen == "provider":
            self._runtime.routes.find(self, {})  # it hears from now on, not from the first call on

    def _folder(self, policy: CachePolicy) -> Callable[[], str | None]:
        """Return what finds the folder of this client's answers when it is first needed."""
        configuration = {
            "name": self._given_name,
            "model": self.model,
            "model_type": self.model_type,
            "endpoint": endpoint_of(self, {}),
            "tenant": policy.tenant or tenant_of(setting("api_key", self, {})),
        }
        return functools.partial(disk_folder, policy, **configuration)

    # The call

    @_with_callbacks
    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Answer as `dspy.LM` does, from the cache, an identical call under way, or a target.

        Blocks this thread. Takes `cache=`, `num_retries=`, `rollout_id=` and provider settings for
        this one call.

        Raises:
            dspy.LMError: The provider's own error, or one of ours (see `dspy_resilient.errors`).
        """
        call = self._begin("__call__", prompt, messages, kwargs)
        return self._run(call)

    @_with_callbacks
    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Answer as `__call__` does, on the running event loop; cancelling leaves nothing behind."""
        call = self._begin("acall", prompt, messages, kwargs)
        return await self._arun(call)

    if hasattr(dspy.LM, "generate"):  # from DSPy 3.5 on, what its adapters call

        @_with_callbacks
        def generate(self, request: Any, **kwargs: Any) -> Any:
            """Answer a typed request as `dspy.LM.generate` does, under the same policies."""
            return self._run(self._begin("generate", request, None, kwargs))

        @_with_callbacks
        async def agenerate(self, request: Any, **kwargs: Any) -> Any:
            """Answer a typed request as `dspy.LM.agenerate` does, under the same policies."""
            return await self._arun(self._begin("agenerate", request, None, kwargs))

    def _run(self, call: Call) -> Any:
        tracer = self._runtime.tracer
        if tracer is None:
            return self._complete(call)
        with tracer.call(call):
            return self._complete(call)

    async def _arun(self, call: Call) -> Any:
        tracer = self._runtime.tracer
        if tracer is None:
            return await self._acomplete(call)
        with tracer.call(call):
            return await self._acomplete(call)

    def _complete(self, call: Call) -> Any:
        started = self._runtime.begin("calls")
        try:
            steps = complete(call, self._runtime)
            served = drive.run(steps, self._runtime.in_flight.call())
        except BaseException as error:
            self._finished(call, started, error=error)
            raise
        return self._hand_out(call, started, served)

    async def _acomplete(self, call: Call) -> Any:
        started = self._runtime.begin("calls")
        try:
            steps = complete(call, self._runtime)
            served = await drive.arun(steps, self._runtime.in_flight.call())
        except BaseException as error:
            self._finished(call, started, error=error)
            raise
        return self._hand_out(call, started, served)

    def _begin(self, method: str, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Call:
        """Take our own keywords out of a call, and find its key."""
        refuse_stream(kwargs)
        own: dict[str, Any] = {
            name: kwargs.pop(name) for name in ("cache", "num_retries") if name in kwargs
        }
        if own:
            check_call_options(**own)
        refuse_ours("a call", kwargs)
        cache: bool | None = own.get("cache")
        retries: Any = own.get("num_retries", self.num_retries)
        if prompt is None and isinstance(kwargs.get("request"), dspy.lm15.Request):
            prompt = kwargs.pop("request")
        if isinstance(prompt, dspy.lm15.Request):
            if prompt.model != self.model:  # as DSPy has it; a fallback's own attempt may differ
                raise ValueError("Request.model must match LM.model")
        elif messages is not None and not called_by_adapter(self, messages):
            _warn_messages()
        if messages is not None:
            kwargs["messages"] = messages
        if self._is_rebuilt:
            check_credentials(self, kwargs)
            for each in self._fallbacks.all():
                check_credentials(each.lm, {})
        args = () if prompt is None else (prompt,)
        cached = self.cache if cache is None else cache
        runtime = self._runtime
        return Call(
            method=method,
            args=args,
            kwargs=kwargs,
            own=own,
            key=key_of(self, method, args, kwargs, runtime.tenant) if cached else None,
            targets=self._targets(),
            special=self._fallbacks.special,
            streams=dspy.settings.send_stream is not None,
            may_wait=not is_sending()
            and (method in ("acall", "agenerate") or not drive.on_a_loop()),
            max_attempts=retries + 1,
            max_wait=self.max_wait,
            budget=float("inf") if self.deadline is None else self.deadline,
        )

    def _targets(self) -> tuple[Target, ...]:
        primary = self._primary
        if primary.lm is not self or primary.history is not self.history:
            primary = self._primary = dataclasses.replace(primary, lm=self, history=self.history)
        if self._fallbacks.history is not self.history:
            self._fallbacks = self._fallbacks.recording(self.history)
        return (primary, *self._fallbacks.general)

    def lend_targets(self) -> tuple[Target, ...]:
        """Return what another client may use as its fallbacks: targets, circuits, gates, limits."""
        return self._targets()

    def _hand_out(self, call: Call, started: float, served: Served) -> Any:
        """Return the outputs of an answer; for a hit, write the history entry that DSPy would."""
        answer = served.answer
        if served.hit:
            self._record_hit(call, served)
        self._finished(call, started, hit=served.hit)
        outputs = answer.fresh_outputs()
        if not answer.key or served.hit or not isinstance(outputs, list):
            return outputs
        messages = call.kwargs.get("messages")
        if not called_by_adapter(self, messages):
            return outputs
        return _OutputsForAdapter(outputs, lambda: self._runtime.cache.evict(answer.key))

    def _record_hit(self, call: Call, served: Served) -> None:
        tally = self._runtime.tally
        tally.add("tokens_saved", served.answer.tokens)
        tally.add("cost_saved", served.answer.cost or 0.0)
        if dspy.settings.disable_history:
            return
        entry = entry_of_hit(call, served)
        if entry is not None:
            super().update_history(entry)

    def _finished(
        self, call: Call, started: float, *, hit: bool = False, error: BaseException | None = None
    ) -> None:
        runtime = self._runtime
        if error is not None:
            runtime.tally.add("errors")
        if runtime.is_heard:
            runtime.emit(
                CallFinished,
                seconds=runtime.clock() - started,
                attempts=len(call.attempts),
                cache_hit=hit,
                error=type(error).__name__ if error is not None else None,
            )

    # Copies and saved state

    def copy(self, **kwargs: Any) -> Self:
        """Return a copy with other settings that is the same client: same circuit, cache, limits.

        Raises:
            TypeError: If `kwargs` names something that belongs to the client as a whole.
        """
        refuse_to_copy(kwargs)
        own = ("max_wait", "deadline", "num_retries", "cache")
        check_call_options(**{name: kwargs[name] for name in own if name in kwargs})
        refuse_stream(kwargs)
        copied: Self = super().copy(**kwargs)
        if kwargs:
            copied._fallbacks = self._fallbacks.vary(copied, self._runtime, kwargs)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that is the same client, with keywords of its own."""
        twin: Self = copy.copy(self)
        memo[id(self)] = twin
        twin.kwargs = copy.deepcopy(self.kwargs, memo)
        twin.callbacks = list(self.callbacks)
        twin.history = list(self.history)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle may hold: no runtime, no credential, no callable."""
        state: dict[str, Any] = super().__getstate__()
        state["kwargs"], secrets, lost = savable(self.kwargs)
        state["_dropped"] = tuple(sorted({*self._dropped, *secrets}))
        for name in TRAINING:
            state[name], own, hooks = savable(state[name])
            lost = (*lost, *own, *hooks)
        if self.callbacks:
            lost = (*lost, "callbacks")
        for name in ("_runtime", "_primary", "_fallbacks", "_is_rebuilt"):
            del state[name]
        state["history"] = []
        state["callbacks"] = []
        state[STATE_KEY] = self._dump_options(lost)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild from a pickle with an empty runtime."""
        state = dict(state)
        options = load_options(state.pop(STATE_KEY), type(self), allow_custom=True)
        super().__setstate__(state)
        name = options.pop("name")
        fallbacks = {each: options.pop(each) for each in FALLBACKS}
        circuit = options.pop("circuit") or None
        self._start(Options(name=name or self.model, circuit=circuit, **options), fallbacks)
        self._is_rebuilt = True

    def dump_state(self) -> dict[str, Any]:
        """Return JSON-ready state that rebuilds this client, with no credential in it.

        Warns once of what cannot be saved and will not be missed by a call: functions, and
        credentials of `launch_kwargs` and `train_kwargs`.
        """
        state, secrets, lost = clean_state(super().dump_state(), self.kwargs)
        state.setdefault("engine", self.engine)
        state[STATE_KEY] = {
            **self._dump_options(lost),
            "dropped": sorted({*self._dropped, *secrets}),
            "max_wait": self.max_wait,
            "deadline": self.deadline,
        }
        return state

    def _dump_options(self, lost: Iterable[str]) -> dict[str, Any]:
        return dump_options(self._runtime.options, self._given_name, self._fallbacks.given, lost)

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> Self:
        """Rebuild a client from `dump_state()`, or from that of a plain `dspy.LM`.

        Same policies, empty runtime. Credentials were never saved; they are read from the
        environment when a call is made, and LMConfigurationError then names what is missing.
        """
        state = dict(state)
        options = dict(state.pop(STATE_KEY, {}))
        dropped = options.pop("dropped", ())
        cached, retries = state.pop("cache", True), state.pop("num_retries", 3)
        if options:
            options = load_options(options, cls, allow_custom=allow_custom_lm_class)
        else:
            options["num_retries"] = retries
        lm: Self = super().load_state(
            {**state, **options}, allow_custom_lm_class=allow_custom_lm_class
        )
        lm.cache, lm.num_retries = cached, retries
        lm._dropped = tuple(dropped)
        lm._is_rebuilt = True
        return lm

    # What the fallbacks can do too

    @property
    def supports_function_calling(self) -> bool:
        """Whether the model and every fallback support tools."""
        mine: bool = super().supports_function_calling
        return mine and self._fallbacks.can("supports_function_calling", self._runtime)

    @property
    def supports_reasoning(self) -> bool:
        """Whether the model and every fallback support native reasoning."""
        mine: bool = super().supports_reasoning
        return mine and self._fallbacks.can("supports_reasoning", self._runtime)

    @property
    def supports_response_schema(self) -> bool:
        """Whether the model and every fallback support structured output."""
        mine: bool = super().supports_response_schema
        return mine and self._fallbacks.can("supports_response_schema", self._runtime)

    @property
    def supported_params(self) -> set[str]:
        """Names of the parameters that the model and every fallback take."""
        params: set[str] = super().supported_params
        return params.intersection(*(each.lm.supported_params for each in self._fallbacks.general))

    # The client

    @property
    def name(self) -> str:
        """The client's name."""
        return self._runtime.name

    @property
    def cache_policy(self) -> CachePolicy:
        """What is remembered, and for how long."""
        return self._runtime.options.cache

    @property
    def circuit(self) -> CircuitBreaker | None:
        """The circuit of the primary, or None with `circuit=False`."""
        return self._runtime.routes.find(self, {}).circuit

    @property
    def circuits(self) -> dict[str, CircuitBreaker]:
        """Every circuit of this client, by the label of its target."""
        routes = [each.routes.find(each.lm, {}) for each in self._every_target()]
        own = {route.label: route.circuit for route in routes if route.circuit is not None}
        return own | self._runtime.circuits()

    def stats(self) -> Stats:
        """Return a snapshot: totals since the client was made or reset, and the last minute.

        `print` shows it as a table. The numbers are those of all copies of this client.
        """
        return self._runtime.stats()

    def explain(self) -> str:
        """Return, for a person, what state the client is in, why, since when and until when.

        A line for the primary and for each fallback.
        """
        targets = self._every_target()
        return self._runtime.explain([each.routes.find(each.lm, {}) for each in targets])

    def _every_target(self) -> tuple[Target, ...]:
        return (self._targets()[0], *self._fallbacks.all())

    def clear_cache(self) -> None:
        """Forget every cached answer of this client."""
        self._runtime.cache.clear()

    def reset(self) -> None:
        """Close the circuits, open the gates, and set the numbers to zero; the cache stays."""
        self._runtime.reset()

    def restart(self) -> None:
        """Start over: new HTTP clients, clean limits, an empty in-flight table, no break on record.

        Does by hand what a break does by itself, and lifts a RestartLimitError. Circuits, cache and
        numbers stay. Calls under way go on with what they have; who waits behind one of them gets
        its answer.

        Raises:
            ClientClosedError: The client was closed.
        """
        self._runtime.check_open()
        self._runtime.restart()

    def close(self, grace: float | None = None) -> None:
        """Refuse further calls and release what this client owns; copies are the same client.

        Idempotent, and safe while calls run. On a thread whose event loop is running it does not
        wait, for the loop could not go on meanwhile: use `aclose` there.

        Args:
            grace: Seconds for which calls under way may go on. What is left then ends with
                ClientClosedError; only a sync call that is in a request without a deadline ends
                with that request. None: they go on for as long as they need.
        """
        number(_ME, "grace", grace, optional=True)
        self.refuse_calls()
        runtime = self._runtime
        if grace is not None and drive.on_a_loop():
            runtime.in_flight.end()
        elif grace is not None:
            drive.run(drive.see_off(runtime.in_flight, grace), InFlight().call())
        runtime.close()
        super().close()

    async def aclose(self, grace: float | None = None) -> None:
        """Do as `close` does, without blocking, and close this event loop's connections too."""
        number(_ME, "grace", grace, optional=True)
        self.refuse_calls()
        runtime = self._runtime
        if grace is not None:
            await drive.arun(drive.see_off(runtime.in_flight, grace), InFlight().call())
        runtime.close()
        await super().aclose()

    def refuse_calls(self) -> None:
        """Refuse further calls with ClientClosedError, as the first step of closing."""
        self._runtime.closed = True

    def run_attempts_apart(self) -> None:
        """Run each sync attempt on a thread of its own, so that its caller can be let go."""
        self._runtime.in_flight.are_endable = True

    def health(self) -> Health:
        """Return whether calls would be answered at present, and how many are under way."""
        return health_of(self._runtime, self.model, self._runtime.routes.find(self, {}))

    def __repr__(self) -> str:
        """Return name, model and state; no setting that could hold a secret."""
        circuit = self.circuit
        state = circuit.state if circuit is not None else "no circuit"
        return f"{type(self).__name__}({self.model!r}, name={self.name!r}, circuit={str(state)!r})"

    def _repr_html_(self) -> str:
        from dspy_resilient.stats.display import client_html  # noqa: PLC0415  # only when asked

        circuits = [(name, each.state, each.explain()) for name, each in self.circuits.items()]
        return client_html(f"{self.name} ({self.model})", circuits, self.stats())

    def update_history(self, entry: dict[str, Any]) -> None:
        """Record a call that DSPy made past us, and say so once: no policy applied to it."""
        if not self._runtime.warned:
            self._runtime.warned = True
            warnings.warn(
                f"{_ME} {self.name!r}: DSPy made a call through a method that this version does not "
                "know; cache, circuit and retries did not apply to it",
                stacklevel=2,
            )
        super().update_history(entry)


class _OutputsForAdapter(list[Any]):
    """Outputs on their way to one of DSPy's adapters.

    An adapter parses them in a loop. A loop that an error leaves drops its iterator before the
    end, and so the answer that could not be parsed is forgotten: no callback is installed,
    and a cached answer costs nothing.
    """

    def __init__(self, outputs: list[Any], evict: Any) -> None:
        super().__init__(outputs)
        self._evict = evict

    def __iter__(self) -> Iterator[Any]:
        parsed = False
        try:
            yield from super().__iter__()
            parsed = True
        finally:
            if not parsed:
                self._evict()

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(super().__iter__()),)


def _warn_messages() -> None:
    warnings.warn(
        "messages= dictionaries are deprecated in DSPy 3.4 and removed in 3.5; pass a "
        "dspy.lm15.Request, or a prompt",
        DeprecationWarning,
        stacklevel=5,
    )
