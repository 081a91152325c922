"""One request and what is sent back: the answer, or the fault acted out.

It is told which fault, if any; the provider keeps the script, and the dialect the wording.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspy_resilient.testing.dialects import Dialect, dialect_of
from dspy_resilient.testing.dialects.openai import CHAT
from dspy_resilient.testing.faults import (
    BadChunk,
    Chaos,
    Close,
    CutStream,
    Empty,
    EmptyText,
    Fault,
    Filtered,
    Garbage,
    Hang,
    Hold,
    NoChoices,
    Reset,
    Slow,
    StallStream,
    Status,
    Truncated,
)
from dspy_resilient.testing.reply import Reply, Turn
from dspy_resilient.testing.wire import Connection, Incoming

logger = logging.getLogger("dspy_resilient")

Said = str | Mapping[str, Any] | Reply
Answer = Said | Sequence[Said] | Callable[[dict[str, Any]], Said | Sequence[Said]]

_JSON = "application/json"
_FOREVER = 10.0**9


@dataclass(frozen=True, slots=True)
class Request:
    """One request that arrived.

    Attributes:
        at: When, on the provider's clock, in seconds.
        method: "POST" for everything a model is asked.
        path: The path, without query.
        headers: By lower-case name.
        body: The parsed JSON object; empty if it was none.
        connection: Number of the TCP connection, from 1.
        status: The status sent, or None while (or if) none was.
    """

    at: float
    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: dict[str, Any] = field(repr=False)
    connection: int
    status: int | None = None


class Exchange:
    """A request being answered.

    Args:
        connection: Where it came from and where the answer goes.
        incoming: The request as read.
        number: Its number, from 1; ids and `Chaos` follow from it.
        at: When it arrived, in seconds.
    """

    def __init__(
        self,
        connection: Connection,
        incoming: Incoming,
        number: int,
        at: float,
    ) -> None:
        self._path = incoming.target.partition("?")[0]
        self._body = _parsed(incoming.body)
        self._dialect = dialect_of(self._path)
        self._connection = connection
        self._method = incoming.method
        self._headers = incoming.headers
        self._number = number
        self._at = at
        self._status: int | None = None

    @property
    def request(self) -> Request:
        """What arrived and what became of it so far."""
        return Request(
            at=self._at,
            method=self._method,
            path=self._path,
            headers=self._headers,
            body=self._body,
            connection=self._connection.number,
            status=self._status,
        )

    async def act(self, fault: Fault | None, answer: Answer) -> None:
        """Answer with what `answer` says, or do as `fault` demands."""
        fault = await _settled(fault, self._number)
        match fault:
            case Hang():
                await asyncio.sleep(_FOREVER if fault.seconds is None else fault.seconds)
                self._connection.close()
            case Reset():
                self._connection.reset()
            case Close():
                self._connection.close()
            case Garbage():
                self._send(200, fault.body, {"content-type": fault.content_type})
            case Empty():
                self._send(200, b"", {"content-type": _JSON})
            case Status():
                self._refuse(fault)
            case _:
                await self._answer(fault, answer)

    async def _answer(self, fault: Fault | None, answer: Answer) -> None:
        if self._dialect is None:
            self._refuse(Status(404))
            return
        try:
            turn = self._turn(self._dialect, fault, answer)
            chunks, headers, length = _worded(self._dialect, self._path, turn)
        except Exception as error:  # the user's function, or a request that makes no sense
            logger.exception("dspy_resilient.testing.answer_failed")
            self._refuse(Status(500, body=f"no answer could be made: {type(error).__name__}"))
            return
        if isinstance(fault, BadChunk):
            spoilt = self._dialect.raw_chunk(fault.data)
            chunks.insert(fault.after_chunks, spoilt)
            length = None if length is None else length + len(spoilt)
        if isinstance(fault, (CutStream, StallStream)):
            await self._interrupt(fault, chunks, headers, length)
        elif length is not None:
            self._send(200, b"".join(chunks), headers)
        else:
            self._begin(headers, None)
            self._finish(chunks)

    async def _interrupt(
        self,
        fault: CutStream | StallStream,
        chunks: list[bytes],
        headers: Mapping[str, str],
        length: int | None,
    ) -> None:
        streamed = length is None
        after = fault.after_chunks if streamed else min(1, fault.after_chunks)
        self._begin(headers, length)
        for chunk in chunks[:after]:
            self._connection.body(chunk)
        if isinstance(fault, CutStream):
            self._cut(fault, streamed)
            return
        await asyncio.sleep(_FOREVER if fault.seconds is None else fault.seconds)
        self._finish(chunks[after:])

    def _begin(self, headers: Mapping[str, str], length: int | None) -> None:
        self._status = 200
        self._connection.head(200, headers, length)

    def _finish(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            self._connection.body(chunk)
        self._connection.end()

    def _cut(self, fault: CutStream, streamed: bool) -> None:
        if fault.how == "eof" and streamed:
            self._connection.end()
        elif fault.how == "reset":
            self._connection.reset()
        else:
            self._connection.close()

    def _turn(self, dialect: Dialect, fault: Fault | None, answer: Answer) -> Turn:
        asked = self._body.get("n") or 1
        replies = _replies(answer, self._body, asked) if dialect.chunks is not None else ()
        match fault:
            case NoChoices():
                replies = ()
            case EmptyText():
                replies = tuple(Reply() for _ in replies)
            case Filtered():
                replies = tuple(Reply(finish="content_filter") for _ in replies)
            case Truncated():
                replies = tuple(reply.truncated() for reply in replies)
            case _:
                pass
        return Turn(self._model(), self._body, replies, self._number)

    def _model(self) -> str:
        in_path = re.search(r"/(?:models|deployments)/([^/:]+)", self._path)
        return str(self._body.get("model") or (in_path.group(1) if in_path else "test"))

    def _refuse(self, fault: Status) -> None:
        headers = {"content-type": _JSON, **fault.headers}
        if fault.retry_after is not None:
            headers["retry-after"] = str(fault.retry_after)
        body = fault.body
        if body is None:
            dialect = self._dialect or CHAT
            body = json.dumps(dialect.error(fault.code, fault.kind))
        self._send(fault.code, body, headers)

    def _send(self, status: int, body: str | bytes, headers: Mapping[str, str]) -> None:
        raw = body.encode() if isinstance(body, str) else body
        self._status = status
        self._connection.head(status, headers, len(raw), raw)


async def _settled(fault: Fault | None, number: int) -> Fault | None:
    """Wait and throw dice as told, and return what is then to be done."""
    while True:
        match fault:
            case Slow():
                await asyncio.sleep(fault.seconds)
                fault = fault.then
            case Hold():
                await fault.wait()
                fault = fault.then
            case Chaos():
                fault = fault.pick(number)
            case _:
                return fault


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _replies(answer: Answer, body: dict[str, Any], asked: int) -> tuple[Reply, ...]:
    said = answer(body) if callable(answer) else answer
    choices = list(said) if isinstance(said, Sequence) and not isinstance(said, str) else [said]
    replies = [Reply.of(choice) for choice in choices]
    return tuple(replies[i % len(replies)] for i in range(asked))


def _worded(
    dialect: Dialect, path: str, turn: Turn
) -> tuple[list[bytes], dict[str, str], int | None]:
    """Return the body in chunks, its headers, and its length unless it is streamed."""
    if dialect.chunks is not None and dialect.streams(path, turn.body):
        return dialect.chunks(turn), {"content-type": dialect.stream_type}, None
    whole = json.dumps(dialect.whole(turn)).encode()
    half = len(whole) // 2
    return [whole[:half], whole[half:]], {"content-type": _JSON}, len(whole)
