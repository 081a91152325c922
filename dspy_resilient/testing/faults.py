"""What can go wrong with one request, as values.

A fault is handed to `Provider.script()`, `Provider.always()` or `Provider.down()`, which act it
out; this module only names the faults. Seconds are floats. A "chunk" is one word of a streamed
answer with whatever the dialect sends around it; an answer that is not streamed has one chunk
per half of its body, so that the faults of a stream cut, stall or spoil it in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

ErrorKind = Literal["", "quota", "context_length", "content_filter"]


@dataclass(frozen=True)
class Status:
    """Answer with this HTTP status and an error body worded as the dialect words it.

    Attributes:
        code: The status, e.g. 503.
        kind: Which of the errors that share a status; the dialect's error codes follow from it.
        retry_after: Sent as Retry-After: seconds or an HTTP date. None (default): no such header.
        headers: Further response headers.
        body: Sent in place of the dialect's own error body.
    """

    code: int
    _: KW_ONLY
    kind: ErrorKind = ""
    retry_after: str | float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | bytes | None = None


def rate_limited(retry_after: str | float | None = None) -> Status:
    """Return a 429, with a Retry-After header if one is given."""
    return Status(429, retry_after=retry_after)


def overloaded() -> Status:
    """Return Anthropic's 529."""
    return Status(529)


def quota_exceeded(code: int = 429) -> Status:
    """Return a refusal for lack of funds; providers send it as 429, 402 or 400."""
    return Status(code, kind="quota")


def context_too_long() -> Status:
    """Return the 400 for a prompt that does not fit the model's context window."""
    return Status(400, kind="context_length")


def content_refused() -> Status:
    """Return the 400 for a prompt that the provider's content filter refuses."""
    return Status(400, kind="content_filter")


@dataclass(frozen=True)
class Hang:
    """Say nothing for `seconds` (None: until the caller gives up), then close the connection."""

    seconds: float | None = None


@dataclass(frozen=True)
class Slow:
    """Wait `seconds`, then answer, or do `then`."""

    seconds: float
    then: Fault | None = None


@dataclass(frozen=True)
class Hold:
    """Wait until `release()` is called, then answer, or do `then`.

    One object may hold any number of requests; `release()` lets all of them go, and later ones
    pass. It may be called from any thread, more than once, and after the provider has stopped.
    """

    then: Fault | None = None
    _released: Future[None] = field(default_factory=Future, repr=False, compare=False)

    def release(self) -> None:
        """Let the held requests go."""
        with contextlib.suppress(Exception):  # released before
            self._released.set_result(None)

    async def wait(self) -> None:
        """Wait for `release()`, on any event loop."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake(_: Future[None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(woken.set)

        self._released.add_done_callback(wake)
        await woken.wait()


@dataclass(frozen=True)
class Reset:
    """Reset the connection (RST) in place of an answer."""


@dataclass(frozen=True)
class Close:
    """Close the connection (FIN) in place of an answer."""


@dataclass(frozen=True)
class Garbage:
    """Answer 200 with a body that is not what was asked for. Default: a gateway's HTML page."""

    body: str | bytes = "<html><body><h1>It works!</h1></body></html>"
    content_type: str = "text/html"


def cut_json() -> Garbage:
    """Return a 200 whose JSON ends in the middle."""
    return Garbage('{"id": "cut", "choices": [{"message": {"content": "half', "application/json")


@dataclass(frozen=True)
class Empty:
    """Answer 200 with no body at all."""


@dataclass(frozen=True)
class NoChoices:
    """Answer 200 with a well-formed body that holds no choice."""


@dataclass(frozen=True)
class EmptyText:
    """Answer normally, but with the empty text."""


@dataclass(frozen=True)
class Truncated:
    """Answer with the first half of the words, as if the token limit had been reached."""


@dataclass(frozen=True)
class Filtered:
    """Answer with no text, as if the provider's content filter had removed it."""


@dataclass(frozen=True)
class CutStream:
    """End the answer after some chunks.

    Attributes:
        after_chunks: Chunks that are still sent.
        how: "eof" ends the body as if it were complete, "close" closes the connection in the
            middle of it, "reset" resets it. What is not streamed cannot end cleanly: "eof" closes.
    """

    after_chunks: int = 1
    how: Literal["eof", "close", "reset"] = "close"


@dataclass(frozen=True)
class StallStream:
    """Pause after some chunks for `seconds` (None: until the caller gives up), then go on."""

    after_chunks: int = 1
    seconds: float | None = None


@dataclass(frozen=True)
class BadChunk:
    """Slip `data` in after some chunks: cut JSON by default, or a provider's error event."""

    after_chunks: int = 1
    data: str = '{"id": "bad", "choices": [{"delta": {"cont'


@dataclass(frozen=True)
class Chaos:
    """Do one of `faults` to a share of the requests, picked by seed and request number.

    The same seed does the same to the n-th request, whatever the timing.
    """

    seed: int = 0
    rate: float = 0.2
    faults: tuple[Fault, ...] = field(
        default_factory=lambda: (
            *(Status(500), Status(503), Status(529), rate_limited(0)),
            *(Reset(), Close(), Garbage(), Empty(), CutStream(), Slow(0.05)),
        )
    )

    def pick(self, number: int) -> Fault | None:
        """Return what happens to request `number`, or None for a normal answer."""
        dice = random.Random(f"{self.seed}:{number}")  # noqa: S311  # reproducible, not secret
        return dice.choice(self.faults) if dice.random() < self.rate else None


Fault = (
    Status
    | Hang
    | Slow
    | Hold
    | Reset
    | Close
    | Garbage
    | Empty
    | NoChoices
    | EmptyText
    | Truncated
    | Filtered
    | CutStream
    | StallStream
    | BadChunk
    | Chaos
)
