"""`ResilientLM`: what DSPy sees.

A `dspy.LM` whose public call methods go through `pipeline.call.complete`: see `lm.entry` for how a
call gets there, and `lm.copies` for copies and saved state. This module has construction, what a
client can do and what it tells of itself; everything else is inherited.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

from dspy.clients.lm import LM  # by reference: a program may put another class at dspy.LM

from dspy_resilient._support.closable import ClosedAtEnd
from dspy_resilient.budgets import Budget
from dspy_resilient.cache import disk_folder
from dspy_resilient.lm.copies import Copyable
from dspy_resilient.lm.options import (
    DEFAULT_ENGINE,
    UNSET,
    build_options,
    check_attribute,
    check_call_options,
)
from dspy_resilient.pipeline import drivers as drive
from dspy_resilient.pipeline.client import ClientState
from dspy_resilient.pipeline.health import Health, health_of
from dspy_resilient.pipeline.in_flight import InFlight
from dspy_resilient.pipeline.options import Options
from dspy_resilient.policies import CachePolicy, number
from dspy_resilient.providers.endpoint import resolve
from dspy_resilient.targets.fallbacks import Fallbacks
from dspy_resilient.targets.keywords import FALLBACKS, refuse_misspelt, refuse_stream
from dspy_resilient.targets.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import dspy

    from dspy_resilient.circuit import CircuitBreaker
    from dspy_resilient.events import Listener
    from dspy_resilient.policies import CircuitPolicy, LimitPolicy, RetryPolicy
    from dspy_resilient.stats.stats import Stats

_ME = "ResilientLM"


class ResilientLM(ClosedAtEnd, Copyable):
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
        max_wait: Seconds for which one call may be held up, all in all, by an open circuit, the
            pause after a 429, or a provider that has answered nothing since. 0 fails fast; default
            60.
        retry: A `RetryPolicy`.
        limits: A `LimitPolicy`, or an int: the most attempts at a time. Default None: no limit.
        fallbacks: Models to ask when the primary cannot answer, in this order: model names,
            `dspy.LM`s, `ResilientLM`s, or dicts of `dspy.LM` arguments. A program does not use
            tools, structured output or native reasoning if one of these models cannot, because
            that model may have to answer. The log says so once.
        context_window_fallbacks: Models to ask when a prompt is too long, in the same forms. If
            none answers, the caller gets the primary's ContextWindowExceededError.
        policy_fallbacks: Models to ask when a content filter refuses a prompt or holds back an
            answer, in the same forms. If none answers, the caller gets the primary's result.
        deadline: Seconds for the whole call, waits and retries included. Default None: no limit.
        on_event: Called with every event (see `events`), in order; its errors are logged once.
        shared: A store that clients of the same name use together: the address of a Redis or Valkey
            server ("redis://", "rediss://" or "valkey://", `?namespace=` keeps environments apart),
            a client for one, or a `shared.Store`. They share circuits; those with the same
            credential also share 429 pauses, `rpm` and `tpm`; with `CachePolicy(shared=True)`
            answers too. Default None: nothing is shared.
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
        engine: Any = DEFAULT_ENGINE,
        async_engine: Any = None,
        prompt_cache: Any = None,
        *,
        name: str | None = None,
        circuit: bool | CircuitPolicy | CircuitBreaker = True,
        max_wait: float = 60.0,
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
        refuse_misspelt(kwargs)
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
        if engine is DEFAULT_ENGINE:
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

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, checked as the argument of that name is."""
        check_attribute(name, value)
        super().__setattr__(name, value)

    def _start(self, options: Options, fallbacks: dict[str, Any]) -> None:
        """Make the shared part: empty cache, closed circuits."""
        self._runtime = ClientState(options, folder=self._folder(options.cache))
        self._primary = Target(self, self._runtime.routes, self._runtime, LM, self.history)
        self._fallbacks = Fallbacks.build(self, self._runtime, fallbacks)
        self._is_rebuilt = False
        policy = self._runtime.circuit_policy
        if policy is not None and policy.listen == "provider":
            self._runtime.routes.find(self, {})  # it hears from now on, not from the first call on

    def _folder(self, policy: CachePolicy) -> Callable[[], str | None]:
        """Return what finds the folder of this client's answers when it is first needed."""
        place = resolve(self.model, self.model_type, self.kwargs, policy.tenant)
        configuration = {
            "name": self._given_name,
            "model": self.model,
            "model_type": self.model_type,
            "endpoint": place.where,
            "tenant": place.credential or "",
        }
        return functools.partial(disk_folder, policy, **configuration)

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
    def circuit(self) -> CircuitBreaker | Any:  # Any: who switches it off knows that it is None
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

    def budget(
        self,
        *,
        dollars: float | None = None,
        tokens: float | None = None,
        requests: int | None = None,
        name: str | None = None,
    ) -> Budget:
        """Bound what this client's calls inside a block may spend: `with lm.budget(dollars=4.0):`.

        Copies and fallbacks count, and so do threads, tasks and DSPy's workers; see `Budget`, which
        takes several clients.

        Args:
            dollars: The most dollars, or None (default) for any number. Above 0.
            tokens: The most tokens, prompt and answer together, or None (default). Above 0.
            requests: The most requests sent, or None (default). At least 1.
            name: With `shared=`: budgets of one name are one budget in all processes. Default None.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of range, or nothing is limited.
        """
        return Budget(self, dollars=dollars, tokens=tokens, requests=requests, name=name)

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
        self._refuse_calls()
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
        self._refuse_calls()
        runtime = self._runtime
        if grace is not None:
            await drive.arun(drive.see_off(runtime.in_flight, grace), InFlight().call())
        runtime.close()
        await super().aclose()

    def _refuse_calls(self) -> None:
        """Refuse further calls with ClientClosedError, as the first step of closing."""
        self._runtime.closed = True

    def _run_attempts_apart(self) -> None:
        """Run each sync attempt on a thread of its own, so that its caller can be let go."""
        self._runtime.in_flight.are_endable = True

    def health(self) -> Health:
        """Return whether calls would be answered at present, and how many are under way."""
        return health_of(self._runtime, self.model, self._runtime.routes.find(self, {}))

    def __repr__(self) -> str:
        """Return name, model and state; no setting that could hold a secret."""
        state = self._runtime.routes.find(self, {}).state or "no circuit"
        return f"{type(self).__name__}({self.model!r}, name={self.name!r}, circuit={str(state)!r})"

    def _repr_html_(self) -> str:
        from dspy_resilient.stats.display import client_html  # noqa: PLC0415  # only when asked

        circuits = [(name, each.state, each.explain()) for name, each in self.circuits.items()]
        conditions = [str(self.health().state)]
        if self._runtime.routes.find(self, {}).gate.wait_time() > 0:
            conditions.append("throttled")
        title = f"{self.name} ({self.model})"
        return client_html(title, circuits, self.stats(), conditions)

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
