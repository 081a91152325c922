"""What a provider itself says of how its answer ended, read as it comes over the wire.

LiteLLM has one word, "stop", for many ends: of a stream it keeps no other, and of Ollama's answers
it does not look whether they are done. This module reads nothing but such ends, in the answers to
requests that are sent in the context of an `Ending`, and judges none of them.
"""

from __future__ import annotations

import functools
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_STREAMS = frozenset({"text/event-stream", "application/x-ndjson"})
_OLLAMAS = ("/api/chat", "/api/generate")
_END = re.compile(
    rb'"(?:finish_?[rR]eason|stop_reason)"\s*:\s*"|"done"\s*:\s*(?:true|false)'
    rb'|"response\.(?:cancelled|completed|failed|incomplete)"'
)
_MOST = 128  # candidates of one answer

_current: ContextVar[Ending | None] = ContextVar("dspy_resilient_ending", default=None)


class Ending:
    """How the answer to the last request in its context ended; for one attempt."""

    __slots__ = ("_is_ollamas", "_lines", "_rest")

    def __init__(self) -> None:
        self._begin(is_ollamas=False)

    def _begin(self, *, is_ollamas: bool) -> None:
        self._is_ollamas = is_ollamas
        self._lines: deque[bytes] = deque(maxlen=1 if is_ollamas else _MOST)
        self._rest = b""

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Read the answers to what is sent in the block, through a client that tells of them."""
        token = _current.set(self)
        try:
            yield
        finally:
            with suppress(ValueError):  # the collector ends it in another context
                _current.reset(token)

    def hears(self, response: httpx.Response) -> bool:
        """Begin anew with `response`; return whether there is anything in its body to read."""
        is_ollamas = response.request.url.path.endswith(_OLLAMAS)
        self._begin(is_ollamas=is_ollamas and response.is_success)
        kind = response.headers.get("content-type", "").partition(";")[0]
        return response.is_success and (is_ollamas or kind in _STREAMS)

    def read(self, data: bytes) -> None:
        """Look at the next part of the body."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines.extend(line for line in lines if _END.search(line))

    def said(self) -> list[dict[str, Any]]:
        """Return the objects in which the provider said that an answer had ended, if it did.

        Ollama's end is the last one that says whether it is done, in any case.
        """
        if self._rest:
            self.read(b"\n")
        said: list[dict[str, Any]] = []
        for line in self._lines:
            with suppress(ValueError, AttributeError):  # no JSON, or no object
                value = json.loads(line.removeprefix(b"data:"))
                inner = value.get("response")  # of an event of OpenAI's Responses
                said.append(inner if isinstance(inner, dict) else value)
        return said or ([{"done": False}] if self._is_ollamas else said)


def tell_endings(http: httpx.Client | httpx.AsyncClient) -> None:
    """Have `http` tell of the answers that it gets in the context of an `Ending`."""
    hook = _alisten if hasattr(http, "aclose") else _listen
    http.event_hooks["response"].append(hook)


def _listen(response: httpx.Response) -> None:
    ending = _current.get()
    if ending is not None and ending.hears(response):
        through: Any = functools.partial(_through, ending, response.iter_bytes)
        response.iter_bytes = through  # type: ignore[method-assign]  # of this one response


async def _alisten(response: httpx.Response) -> None:
    ending = _current.get()
    if ending is not None and ending.hears(response):
        through: Any = functools.partial(_athrough, ending, response.aiter_bytes)
        response.aiter_bytes = through  # type: ignore[method-assign]  # of this one response


def _through(ending: Ending, source: Any, *args: Any, **kwargs: Any) -> Iterator[bytes]:
    for data in source(*args, **kwargs):
        ending.read(data)
        yield data


async def _athrough(ending: Ending, source: Any, *args: Any, **kwargs: Any) -> AsyncIterator[bytes]:
    async for data in source(*args, **kwargs):
        ending.read(data)
        yield data
