"""Run one scenario on plain `dspy.LM` and on `ResilientLM`, and compare all that can be seen of it.

Each side gets a provider of its own that answers alike, so request numbers and ids agree. What is
compared: the result or the exception, the requests with their headers and bodies, every history
entry key by key, the tracked usage, and what callbacks were told. The one difference allowed is
the key "attempts" in our history entries.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import gc
import inspect
import itertools
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import dspy
import litellm
import pydantic
import pytest
from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

from dspy_resilient import ResilientLM
from dspy_resilient.testing import Provider

KEY = "dummy-key-for-tests"

# LiteLLM finishes its answer types at their first use, and pydantic warns of what it finds there.
with warnings.catch_warnings(action="ignore"):
    litellm.ModelResponse()
# On a thread that never had an event loop, LiteLLM's sync calls make one and do not close it.
asyncio.set_event_loop(None)

_OF_THE_RUN = {"timestamp", "created", "created_at", "predict_id"}
_INVENTED = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclasses.dataclass
class Seen:
    """What one side of a comparison showed.

    Attributes:
        lm: The LM that was used.
        result: What the scenario returned, or the facts of what it raised, as plain data.
        error: What it raised.
        requests: What the provider received.
        history: The LM's history entries, without time, uuid and our "attempts".
        usage: What `dspy.track_usage` counted.
        callbacks: What a callback was told, in order.
        hits: For each history entry, whether it was a hit, which is to say used nothing.
        marks: For each history entry, what mark of a hit the response bears, if any.
        attempts: For each history entry, the number of attempts; None where it does not say.
    """

    lm: dspy.LM
    result: Any = None
    error: Exception | None = None
    requests: list[Any] = dataclasses.field(default_factory=list)
    history: list[Any] = dataclasses.field(default_factory=list)
    usage: Any = None
    callbacks: list[Any] = dataclasses.field(default_factory=list)
    hits: list[bool] = dataclasses.field(default_factory=list)
    marks: list[bool | None] = dataclasses.field(default_factory=list)
    attempts: list[int | None] = dataclasses.field(default_factory=list)


class Recorder(dspy.utils.callback.BaseCallback):
    """Writes down what callbacks are told about LM calls."""

    def __init__(self):
        self.told = []

    def on_lm_start(self, call_id, instance, inputs):
        self.told.append(("start", inputs))

    def on_lm_end(self, call_id, outputs, exception=None):
        self.told.append(("end", outputs, type(exception).__name__))


def run_on_a_loop(coroutine):
    """Run `coroutine` on a loop of its own, and leave no connection of LiteLLM's behind."""

    async def run():
        try:
            return await coroutine
        finally:
            await close_async_clients()
            shared = vars(litellm).get("module_level_aclient")
            if isinstance(shared, AsyncHTTPHandler):  # else it is our stand-in, which stays
                del litellm.module_level_aclient  # made again when needed
            if shared is not None:
                await shared.close()

    return asyncio.run(run())


async def close_async_clients():
    """Close LiteLLM's async clients; again, where the cache has changed under it meanwhile."""
    for _ in range(10):
        with suppress(RuntimeError):
            await litellm.close_litellm_async_clients()
            return


@contextmanager
def leaks_of_litellm():
    """Close what LiteLLM keeps open to a provider that is about to go, and let it leak the rest.

    It has no way to close what belongs to an event loop that is gone.
    """
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        yield
        close_clients()
        for thread in threading.enumerate():
            if thread.name.endswith("(producer)"):  # DSPy's, of a stream that sync code has read
                thread.join()
        gc.collect()


def close_clients():
    """Close the clients in LiteLLM's cache; async ones are closed where their loop ends."""
    clients = litellm.in_memory_llm_clients_cache
    for client in list(clients.cache_dict.values()):
        if not inspect.iscoroutinefunction(client.close):
            client.close()
    clients.flush_cache()


def as_data(value: Any, url: str = "\0") -> Any:
    """Return `value` in a form that can be compared and printed.

    Times and identities are left out; `url` becomes "URL", and what was invented for one request "UUID".
    """

    def convert(value):
        match value:
            case str():
                return _INVENTED.sub("UUID", value.replace(url, "URL"))
            case None | bool() | int() | float() | bytes() | enum.Enum():
                return value
            case type():
                return value.__name__, getattr(value, "model_json_schema", dict)()
            case dspy.Prediction() | dspy.Example():
                return type(value).__name__, convert(value.toDict())
            case pydantic.BaseModel():
                return type(value).__name__, convert(value.model_dump(warnings=False))
            case BaseException():
                told = ("code", "status", "provider", "model", "provider_code", "request_id")
                facts = {name: convert(getattr(value, name, None)) for name in told}
                return type(value).__name__, convert(str(value)), facts, type(value.__cause__)
            case Mapping():
                return {
                    convert(key): convert(item)
                    for key, item in value.items()
                    if key not in _OF_THE_RUN
                }
            case list() | tuple() | set() | frozenset():
                return [convert(item) for item in value]
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return type(value).__name__, convert(fields)
        return type(value).__name__, convert(getattr(value, "__dict__", {}))

    return convert(value)


def differences(mine: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Say where two pieces of plain data differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in {**mine, **theirs}:
            inner = mine.get(name, "<missing>"), theirs.get(name, "<missing>")
            yield from differences(*inner, f"{path}[{name!r}]")
    elif isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        for number, pair in enumerate(itertools.zip_longest(mine, theirs, fillvalue="<missing>")):
            yield from differences(*pair, f"{path}[{number}]")
    elif mine != theirs:
        yield f"{path}: {mine!r}, but dspy.LM: {theirs!r}"


def _requests(provider):
    return [
        {
            "path": f"{request.method} {request.path}",
            "headers": {n: v for n, v in request.headers.items() if n != "host"},
            "body": request.body,
        }
        for request in provider.requests
        if request.path != "/api/show"  # LiteLLM asks Ollama about a model once, some time later
    ]


def observe(build, scenario, answer, faults) -> Seen:
    """Run `scenario` on the LM that `build` makes, and return what could be seen of it."""
    dspy.cache.reset_memory_cache()
    recorder = Recorder()
    with Provider(answer, faults=faults) as provider, leaks_of_litellm():
        lm = build(provider)
        seen = Seen(lm)
        callbacks = [*dspy.settings.callbacks, recorder]
        with dspy.context(lm=lm, callbacks=callbacks), dspy.track_usage() as usage:
            try:
                seen.result = as_data(scenario(lm), provider.url)
            except Exception as error:  # compared like any other outcome
                seen.error = error
                seen.result = as_data(error, provider.url)
        seen.requests = as_data(_requests(provider), provider.url)
        seen.usage = as_data(usage.get_total_tokens(), provider.url)
        seen.callbacks = as_data(recorder.told, provider.url)
        for entry in lm.history:
            entry = dict(entry)
            attempts = entry.pop("attempts", None)
            seen.attempts.append(None if attempts is None else len(attempts))
            entry.pop("cache_hit", None)
            seen.hits.append(entry["usage"] == {})
            seen.marks.append(getattr(entry["response"], "cache_hit", None))
            seen.history.append(as_data(entry, provider.url))
    return seen


@pytest.fixture(scope="session", autouse=True)
def _imports_rest():
    """What is there by now, LiteLLM's many types, need not be looked through after each test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def compare():
    """Run a scenario on both sides and assert that all that can be seen is the same.

    `compare(scenario, model=…, answer=…, faults=…, **options)` returns what was seen of plain
    `dspy.LM` and of `ResilientLM`. `scenario` gets the LM, which is also DSPy's default. With
    `raises` or `may_raise` both may raise the same; what is named in `but` is left to the test.
    """
    made = []

    def run(
        scenario: Callable[[dspy.LM], Any],
        model: str = "openai/gpt-4o-mini",
        answer: Any = "Paris",
        faults: tuple[Any, ...] = (),
        raises: type[Exception] | None = None,
        may_raise: bool = False,
        but: tuple[str, ...] = (),
        **options: Any,
    ) -> tuple[Seen, Seen]:
        def arguments(provider):
            if not isinstance(options.get("engine", ""), str):
                return options
            base = provider.base(model.partition("/")[0])
            return {"api_base": base, "api_key": KEY, **options}

        def plain(provider):
            return dspy.LM(model, **{"engine": "litellm", **arguments(provider)})

        def ours(provider):
            made.append(ResilientLM(model, **arguments(provider)))
            return made[-1]

        theirs = observe(plain, scenario, answer, faults)
        mine = observe(ours, scenario, answer, faults)
        if raises is not None:
            assert type(theirs.error) is raises
        elif theirs.error is not None and not may_raise:
            raise theirs.error
        for name in ("result", "requests", "history", "hits", "marks", "usage", "callbacks"):
            if name not in but:
                assert [*differences(getattr(mine, name), getattr(theirs, name), name)] == []
        assert [entry.get("cache_hit", False) for entry in mine.lm.history] == mine.hits
        assert None not in mine.attempts
        return theirs, mine

    yield run
    for lm in made:
        lm.close()


@pytest.fixture(params=["sync", "async"])
def call(request):
    """Call a module or an LM by `__call__` and by `acall`: `call(program, question="…")`."""
    if request.param == "sync":
        return lambda thing, *args, **kwargs: thing(*args, **kwargs)
    return lambda thing, *args, **kwargs: run_on_a_loop(thing.acall(*args, **kwargs))


@pytest.fixture
def on_a_loop():
    """Run a coroutine on an event loop of its own."""
    return run_on_a_loop
