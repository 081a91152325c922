"""Put the installed DSPy 3.4 into the shape that 3.5 is to have, until a released 3.5 takes its place.

`apply()`, called before our package is imported, gives `dspy.BaseLM` the methods `generate` and
`agenerate`, has adapters call those with a `Request` (n, cache, rollout_id and client settings by
keyword), refuses `messages=`, and takes the deprecation module away. Everything below, engines,
cache and history, is DSPy's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import json
import sys
import uuid
from typing import Any

import dspy
import pydantic
from dspy._vendor.lm15.providers import openai_chat
from dspy.adapters.base import Adapter
from dspy.adapters.two_step_adapter import TwoStepAdapter
from dspy.clients import execution
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.clients.base_lm import BaseLM
from dspy.clients.call_result import legacy_output
from dspy.clients.capabilities import with_capability_planning
from dspy.clients.legacy_requests import _strict_json_schema
from dspy.clients.lm15_boundary import history_messages
from dspy.lm15 import Request, Response, request_from_openai_chat
from dspy.utils.callback import with_callbacks

_EXECUTION_KEYS = ("n", "num_generations", "cache", "rollout_id")
_KNOWN_KEYS = (
    openai_chat._INGEST_CONFIG_KEYS
    | openai_chat._INGEST_EXTENSIONS_KEYS
    | openai_chat._INGEST_CALL_MODE_KEYS
)


@dataclasses.dataclass
class _Prepared(execution.PreparedCall):
    def key(self, lm, asynchronous):
        return {**super().key(lm, False), "n": self.n}  # one cache for sync and async


def _prepare(lm, request, n, cache, rollout_id, options):
    if not isinstance(request, Request):
        raise TypeError("generate() takes a dspy.lm15.Request")
    if extra := set(options) - CLIENT_KEYS:
        raise TypeError(f"Generation options belong in Request.config: {sorted(extra)}")
    n = lm.kwargs.get("n") or 1 if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError("n must be a positive integer")
    kwargs = {"cache": lm.cache if cache is None else cache, "rollout_id": rollout_id}
    if rollout_id is None:
        kwargs["rollout_id"] = lm.kwargs.get("rollout_id")
    call = _Prepared(**vars(execution.prepare(lm, request, None, kwargs)))
    call.n, call.kwargs, call.legacy = n, {**options, **kwargs}, {"model": lm.model, **options}
    return call


def _finalize(lm, call, options, result):
    if not result.cache_hit and dspy.settings.usage_tracker:
        dspy.settings.usage_tracker.add_usage(lm.model, result.usage)
    responses = list(result.responses)
    if not dspy.settings.disable_history:
        entry = {
            "prompt": None,
            "messages": history_messages(call.request),
            "kwargs": {name: v for name, v in options.items() if not name.startswith("api_")},
            "request": call.request,
            "response": responses[0] if len(responses) == 1 else tuple(responses),
            "outputs": result.outputs,
            "usage": result.usage,
            "cost": result.cost,
            "timestamp": dt.datetime.now().isoformat(),  # noqa: DTZ005, TID251
            "uuid": str(uuid.uuid4()),
            "model": lm.model,
            "response_model": result.response_model,
            "model_type": lm.model_type,
        }
        if result.cost_details:
            entry["cost_details"] = result.cost_details
        lm.update_history(entry)
    return responses


@with_callbacks
def generate(
    self, request: Request, *, n: int = 1, cache=None, rollout_id=None, **client_options
) -> list[Response]:
    """Return `n` responses for one request, as DSPy adapters do."""
    call = _prepare(self, request, n, cache, rollout_id, client_options)
    return _finalize(self, call, client_options, execution.execute(self, call))


@with_callbacks
async def agenerate(
    self, request: Request, *, n: int = 1, cache=None, rollout_id=None, **client_options
) -> list[Response]:
    """Async equivalent of `generate`."""
    given = (self, request, n, cache, rollout_id, client_options)
    call = await asyncio.to_thread(_prepare, *given)
    return _finalize(self, call, client_options, await execution.aexecute(self, call))


def build_request(lm, messages: list[dict[str, Any]], options: dict[str, Any]) -> Request:
    """Turn what an adapter has rendered and been told into the one `Request`."""
    body = {
        name: value
        for name, value in {**lm.kwargs, **options}.items()
        if name not in CLIENT_KEYS and name not in _EXECUTION_KEYS and value is not None
    }
    more = {name: body.pop(name) for name in list(body) if name not in _KNOWN_KEYS}
    cache = more.pop("prompt_cache", None)
    wanted = body.get("response_format")
    if isinstance(wanted, type) and issubclass(wanted, pydantic.BaseModel):
        schema = _strict_json_schema(wanted.model_json_schema())
        named = {"name": wanted.__name__, "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    request = request_from_openai_chat({"model": lm.model, "messages": messages, **body})
    config = dataclasses.replace(request.config, cache=cache or request.config.cache)
    if more:
        json.dumps(more)  # extensions are JSON values
        config = dataclasses.replace(config, extensions={**(config.extensions or {}), **more})
    return dataclasses.replace(request, config=config)


def _execution_options(options: dict[str, Any]) -> dict[str, Any]:
    named = {"n": options.get("n", options.get("num_generations"))}
    named |= {name: options.get(name) for name in ("cache", "rollout_id", *CLIENT_KEYS)}
    return {name: value for name, value in named.items() if value is not None}


def _ask(adapter, lm, lm_kwargs, signature, demos, inputs):
    processed = adapter._call_preprocess(lm, lm_kwargs, signature, inputs)
    messages = adapter.format(processed, demos, inputs)
    if lm_kwargs.get("parallel_tool_calls") is not None:
        lm_kwargs.setdefault("tool_choice", "auto")
    return processed, build_request(lm, messages, lm_kwargs)


class _Outputs:
    """Responses as parsing reads them: one after the other, in a loop over the list itself."""

    def __init__(self, responses):
        self._responses = responses

    def __iter__(self):
        for response in self._responses:
            yield legacy_output(response, logprobs=response.logprobs is not None)


@with_capability_planning
def _adapter_call(self, lm, lm_kwargs, signature, demos, inputs):
    processed, request = _ask(self, lm, lm_kwargs, signature, demos, inputs)
    responses = lm.generate(request, **_execution_options(lm_kwargs))
    return self._call_postprocess(processed, signature, _Outputs(responses), lm, lm_kwargs)


@with_capability_planning
async def _adapter_acall(self, lm, lm_kwargs, signature, demos, inputs):
    processed, request = _ask(self, lm, lm_kwargs, signature, demos, inputs)
    responses = await lm.agenerate(request, **_execution_options(lm_kwargs))
    return self._call_postprocess(processed, signature, _Outputs(responses), lm, lm_kwargs)


class _ThroughGenerate:
    """An LM as the one adapter needs it that asks by itself."""

    def __init__(self, lm):
        self._lm = lm

    async def acall(self, messages, **options):
        request = build_request(self._lm, messages, options)
        responses = await self._lm.agenerate(request, **_execution_options(options))
        return [*_Outputs(responses)]


def _two_steps(acall):
    async def through_generate(self, lm, lm_kwargs, signature, demos, inputs):
        return await acall(self, _ThroughGenerate(lm), lm_kwargs, signature, demos, inputs)

    return through_generate


def _finalize_call(finalize):
    def without_controls(lm, call, result):
        call.kwargs = {n: v for n, v in call.kwargs.items() if n not in _EXECUTION_KEYS}
        return finalize(lm, call, result)

    return without_controls


def _refusing_messages(method):
    """Have the method `method` refuse messages=; DSPy's callbacks see its own signature."""
    body = method.__wrapped__

    def check(messages):
        if messages is not None:
            raise TypeError("lm(messages=[...]) was removed in DSPy 3.5")

    if asyncio.iscoroutinefunction(body):

        @with_callbacks
        async def acall(self, prompt=None, *, cache=None, rollout_id=None, **options):
            check(options.get("messages"))
            return await body(self, prompt, **_given(cache, rollout_id), **options)

        return acall

    @with_callbacks
    def __call__(  # noqa: N807
        self, prompt=None, *, cache=None, rollout_id=None, **options
    ):
        check(options.get("messages"))
        return body(self, prompt, **_given(cache, rollout_id), **options)

    return __call__


def _given(cache, rollout_id):
    named = {"cache": cache, "rollout_id": rollout_id}
    return {name: value for name, value in named.items() if value is not None}


def apply():
    """Change DSPy for this process."""
    sys.modules["dspy.clients._deprecation"] = None  # gone: importing it fails
    BaseLM.generate, BaseLM.agenerate = generate, agenerate
    BaseLM.__call__ = _refusing_messages(BaseLM.__call__)
    BaseLM.acall = _refusing_messages(BaseLM.acall)
    Adapter.__call__, Adapter.acall = _adapter_call, _adapter_acall
    TwoStepAdapter.acall = _two_steps(TwoStepAdapter.acall)
    execution.finalize = _finalize_call(execution.finalize)
