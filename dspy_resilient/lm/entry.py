"""Where a user's call comes in and its answer goes out: DSPy's public call methods.

A call becomes a `Call`, which `pipeline.call.complete` answers; this module takes our own keywords
out of it before, and after it gives back what DSPy would: outputs, history entry, callbacks.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import TYPE_CHECKING, Any, TypeVar, overload

import dspy
from dspy.clients.lm import LM  # by reference: a program may put another class at dspy.LM
from dspy.utils.callback import with_callbacks

from dspy_resilient.events import CallFinished, log_failure
from dspy_resilient.lm import mlflow_span
from dspy_resilient.lm.history import entry_of_hit
from dspy_resilient.lm.options import check_call_options
from dspy_resilient.lm.saving import check_credentials
from dspy_resilient.pipeline import drivers as drive
from dspy_resilient.pipeline.call import complete
from dspy_resilient.pipeline.in_flight import is_sending
from dspy_resilient.pipeline.state import Call, Served
from dspy_resilient.pipeline.twin import called_by_adapter
from dspy_resilient.providers.endpoint import resolve
from dspy_resilient.targets.keywords import refuse_ours, refuse_stream
from dspy_resilient.targets.request_key import key_of
from dspy_resilient.targets.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from dspy.lm15 import Request, Response

    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.targets.fallbacks import Fallbacks

if TYPE_CHECKING:
    Messages: TypeAlias = Sequence[Mapping[str, Any]]

_NEVER_CALLED = ("forward", "aforward")
_Method = TypeVar("_Method", bound="Callable[..., Any]")


def _with_callbacks(method: _Method) -> _Method:
    """Have a call method tell the user's DSPy callbacks what DSPy's own would, and keep its type."""
    dspys = inspect.signature(getattr(LM, method.__name__))
    method.__signature__ = dspys  # type: ignore[attr-defined]  # what `inspect` looks for first
    decorated: _Method = with_callbacks(method)
    return decorated


class CallEntry(LM):
    """A `dspy.LM` whose calls go through the pipeline."""

    max_wait: float
    deadline: float | None
    _runtime: ClientState
    _primary: Target
    _fallbacks: Fallbacks
    _is_rebuilt: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a subclass with a method that is never called here, but would be in `dspy.LM`."""
        super().__init_subclass__(**kwargs)
        own = [
            name
            for name in _NEVER_CALLED
            if getattr(cls, name, None) is not getattr(LM, name, None)
        ]
        if own:
            raise TypeError(
                f"{cls.__name__} overrides {' and '.join(own)}, which a ResilientLM never calls; "
                "override __call__ and acall around super(), or give engine= an object with "
                "complete(Request) -> Response"
            )

    @overload
    def __call__(self, *, request: Request, **kwargs: Any) -> Response: ...
    @overload
    def __call__(
        self, prompt: str | None = None, *, messages: Messages | None = None, **kwargs: Any
    ) -> list[Any]: ...
    @overload
    def __call__(self, prompt: Request, **kwargs: Any) -> Response: ...
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

    @overload
    async def acall(self, *, request: Request, **kwargs: Any) -> Response: ...
    @overload
    async def acall(
        self, prompt: str | None = None, *, messages: Messages | None = None, **kwargs: Any
    ) -> list[Any]: ...
    @overload
    async def acall(self, prompt: Request, **kwargs: Any) -> Response: ...
    @_with_callbacks
    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Answer as `__call__` does, on the running event loop; cancelling leaves nothing behind."""
        call = self._begin("acall", prompt, messages, kwargs)
        return await self._arun(call)

    if hasattr(LM, "generate"):  # from DSPy 3.5 on, what its adapters call

        @_with_callbacks
        def generate(self, request: Request, **kwargs: Any) -> list[Response]:
            """Answer a typed request as `dspy.LM.generate` does, under the same policies."""
            responses: list[Response] = self._run(self._begin("generate", request, None, kwargs))
            return responses

        @_with_callbacks
        async def agenerate(self, request: Request, **kwargs: Any) -> list[Response]:
            """Answer a typed request as `dspy.LM.agenerate` does, under the same policies."""
            responses: list[Response] = await self._arun(
                self._begin("agenerate", request, None, kwargs)
            )
            return responses

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
        blocked = None if method in ("acall", "agenerate") else drive.running_loop()
        is_inside = is_sending()
        return Call(
            method=method,
            args=args,
            kwargs=kwargs,
            own=own,
            key=self._key(method, args, kwargs) if cached else None,
            targets=self._targets(),
            settings=self.kwargs,
            messages=messages,
            special=self._fallbacks.special,
            streams=dspy.settings.send_stream is not None,
            may_wait=blocked is None and not is_inside,
            loop=None if is_inside else blocked,
            max_attempts=retries + 1,
            max_wait=self.max_wait,
            budget=float("inf") if self.deadline is None else self.deadline,
        )

    def _key(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        settings = {**self.kwargs, **kwargs}
        place = resolve(self.model, self.model_type, settings, self._runtime.tenant)
        return key_of(place, method, args, settings)

    def _targets(self) -> tuple[Target, ...]:
        primary = self._primary
        if primary.lm is not self or primary.history is not self.history:
            primary = self._primary = dataclasses.replace(primary, lm=self, history=self.history)
        if self._fallbacks.history is not self.history:
            self._fallbacks = self._fallbacks.recording(self.history)
        return (primary, *self._fallbacks.general)

    def _lend_targets(self) -> tuple[Target, ...]:
        """Return what another client may use as its fallbacks: targets, circuits, gates, limits."""
        return self._targets()

    def _hand_out(self, call: Call, started: float, served: Served) -> Any:
        """Return the outputs of an answer; for a hit, write the history entry that DSPy would."""
        answer = served.answer
        if served.hit:
            self._record_hit(call, served)
        self._finished(call, started, served=served)
        outputs = answer.fresh_outputs()
        if not answer.key or served.hit or not isinstance(outputs, list):
            return outputs
        if not self._is_adapters(call):
            return outputs
        return _OutputsForAdapter(outputs, lambda: self._runtime.cache.evict(answer.key))

    def _is_adapters(self, call: Call) -> bool:
        """Whether an adapter makes this call: in DSPy 3.5 what a module asks `generate` for."""
        if call.method in ("generate", "agenerate"):
            return bool(dspy.settings.caller_modules)
        return called_by_adapter(self, call.messages)

    def _record_hit(self, call: Call, served: Served) -> None:
        answer = served.answer
        self._runtime.tally.save(answer.tokens, answer.cost or 0.0)
        if dspy.settings.disable_history:
            return
        entry = entry_of_hit(call, served)
        if entry is not None:
            super().update_history(entry)

    def _finished(
        self,
        call: Call,
        started: float,
        *,
        served: Served | None = None,
        error: BaseException | None = None,
    ) -> None:
        if mlflow_span.is_open():
            mlflow_span.describe(call, served)
        runtime = self._runtime
        if error is not None:
            runtime.tally.add("errors")
        if isinstance(error, Exception):
            log_failure(runtime.name, error, len(call.attempts))
        if runtime.is_heard:
            runtime.emit(
                CallFinished,
                seconds=runtime.clock() - started,
                attempts=len(call.attempts),
                cache_hit=served is not None and served.hit,
                error=type(error).__name__ if error is not None else None,
            )


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
