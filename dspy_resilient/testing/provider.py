"""A language-model provider on this machine that answers and fails as told.

It decides what happens to each request and remembers what it was asked; the server carries the
bytes and the dialects word them. It knows no retry, circuit or cache: it is what those are tried
against.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Self

from dspy_resilient.testing.answers import dspy_answers
from dspy_resilient.testing.dialects import base_path
from dspy_resilient.testing.exchange import Answer, Exchange, Request
from dspy_resilient.testing.faults import Fault, Hang, Reset, Status
from dspy_resilient.testing.server import Server
from dspy_resilient.testing.wire import Connection, Incoming

Outage = Literal["refuse", "reset", "500", "hang"]

_OUTAGES: Mapping[str, Fault] = {
    "refuse": Reset(),  # for a request that was on its way when the port closed
    "reset": Reset(),
    "500": Status(500),
    "hang": Hang(),
}


class Provider:
    """A scripted provider over HTTP; nothing runs before `start()` or `with`.

    It speaks the chat, text, responses and embeddings formats of OpenAI (also at the paths of
    Azure, Groq, …), Anthropic's messages, Gemini's generateContent, Cohere's chat and Ollama's
    two, streamed or not, over keep-alive connections. Methods may be called from any thread and, but for
    `start()` and `stop()`, from the answer function.

    Args:
        answer: What the model says: a text, a mapping with `text`, `reasoning` and `tool_calls`,
            or a list of these, one per choice; or a function from the request's parsed body to
            one of them. It runs on the server's thread: while it blocks, nothing is answered.
            What it raises becomes a 500, and a line in the log. Default: `dspy_answers()`.
        latency: Seconds before anything is answered; may be changed at any time.
        faults: The script to begin with, as for `script()`.
        clock: Stamps requests.
        keep: How many requests are remembered; the oldest go first.

    Example:
        >>> from urllib.request import urlopen
        >>> import dspy
        >>> with Provider("Paris") as provider:
        ...     with urlopen(provider.api_base + "/chat/completions", data=b"{}") as answer:
        ...         answer.status, provider.count
        (200, 1)
    """

    def __init__(
        self,
        answer: Answer | None = None,
        *,
        latency: float = 0.0,
        faults: Iterable[Fault | None] = (),
        clock: Callable[[], float] = time.monotonic,
        keep: int = 10_000,
    ) -> None:
        self.answer: Answer = dspy_answers() if answer is None else answer
        self.latency = latency
        self._clock = clock
        self._server = Server(self._serve, self._connected)
        self._changed = threading.Condition()
        self._exchanges: deque[Exchange] = deque(maxlen=keep)
        self._numbers = itertools.count(1)
        self._count = 0
        self._opened = 0
        self._opened_before = 0
        self._script: deque[Fault | None] = deque()
        self._always: Fault | None = None
        self._outage: Outage | Fault | None = None
        self.script(*faults)

    def start(self) -> Self:
        """Listen, on the same port as before if it ran before."""
        self._server.start(listen=self._outage != "refuse")
        return self

    def stop(self) -> None:
        """Drop all connections and free port and thread, at once. Idempotent."""
        self._server.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The root, "http://127.0.0.1:port". RuntimeError before the first start."""
        if not self._server.port:
            raise RuntimeError("the provider has no address before start()")
        return f"http://127.0.0.1:{self._server.port}"

    @property
    def api_base(self) -> str:
        """The `api_base` for "openai/…" models."""
        return self.base("openai")

    def base(self, provider: str) -> str:
        """Return the `api_base` that LiteLLM's route for `provider` ("anthropic", …) expects."""
        return self.url + base_path(provider)

    @property
    def requests(self) -> list[Request]:
        """The requests that arrived, oldest first."""
        with self._changed:
            return [exchange.request for exchange in self._exchanges]

    @property
    def count(self) -> int:
        """How many requests arrived since the start or `clear()`."""
        return self._count

    @property
    def connections(self) -> int:
        """How many TCP connections were opened since the start or `clear()`."""
        return self._opened - self._opened_before

    def wait_for(self, count: int, timeout: float = 10.0) -> None:
        """Block until `count` requests have arrived; TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._count >= count, timeout):
                raise TimeoutError(f"{self._count} of {count} requests arrived in {timeout:g} s")

    def clear(self) -> None:
        """Forget the requests and count from 0 again; faults stay as they are."""
        with self._changed:
            self._exchanges.clear()
            self._count = 0
            self._opened_before = self._opened

    def script(self, *faults: Fault | None) -> None:
        """Let the next requests meet these, one each, in order; None stands for a normal answer."""
        for fault in faults:
            _check(fault)
        with self._changed:
            self._script.extend(faults)

    def always(self, fault: Fault | None) -> None:
        """Let every request that the script leaves meet `fault`; None ends it."""
        _check(fault)
        self._always = fault

    def down(self, mode: Outage | Fault = "refuse") -> None:
        """Fail every request until `up()`; the script waits.

        Args:
            mode: "refuse" drops all connections and refuses new ones; "reset", "500" and "hang"
                still accept requests, and count them; so does any fault given here.
        """
        if not isinstance(mode, str):
            _check(mode)
        elif mode not in _OUTAGES:
            modes = ", ".join(map(repr, _OUTAGES))
            raise ValueError(f"Provider: mode must be one of {modes}, or a fault; got {mode!r}")
        self._outage = mode
        if self._server.is_running:
            self._server.shut() if mode == "refuse" else self._server.open()

    def up(self) -> None:
        """End `down()`, on the same port; requests that hang go on hanging."""
        self._outage = None
        if self._server.is_running:
            self._server.open()

    def __repr__(self) -> str:
        where = self.url if self._server.port else "not started"
        return f"<Provider {where} requests={self._count}>"

    def _connected(self) -> int:
        with self._changed:
            self._opened += 1
            return self._opened

    async def _serve(self, connection: Connection, incoming: Incoming) -> None:
        exchange = Exchange(connection, incoming, next(self._numbers), self._clock())
        with self._changed:
            fault = self._next_fault()
            self._exchanges.append(exchange)
            self._count += 1
            self._changed.notify_all()
        if self.latency:
            await asyncio.sleep(self.latency)
        await exchange.act(fault, self.answer)

    def _next_fault(self) -> Fault | None:
        if self._outage is not None:
            return _OUTAGES[self._outage] if isinstance(self._outage, str) else self._outage
        return self._script.popleft() if self._script else self._always


def _check(fault: object) -> None:
    if fault is not None and not isinstance(fault, Fault):
        raise TypeError(f"Provider: expected a fault or None; got {fault!r}")
