"""One TCP connection that speaks enough HTTP/1.1: requests in, bytes out, in the ways asked for.

It knows nothing of models, dialects or faults, and runs on one event loop only. A request body
needs a Content-Length. Writing to a connection that is gone does nothing.
"""

from __future__ import annotations

import asyncio
import http
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("dspy_resilient")

_ABORTING_LINGER = struct.pack("HH" if os.name == "nt" else "ii", 1, 0)


@dataclass(frozen=True)
class Incoming:
    """A request as it was read; header names are lower-case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Connection(asyncio.Protocol):
    """A keep-alive connection; each request runs `serve` in a task, one after the other.

    The task is cancelled when the caller hangs up.
    """

    def __init__(
        self,
        number: int,
        serve: Callable[[Connection, Incoming], Coroutine[Any, Any, None]],
        lost: Callable[[Connection], object],
    ) -> None:
        self.number = number
        self._serve = serve
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._buffer = bytearray()
        self._head: tuple[str, str, dict[str, str]] | None = None
        self._chunked = False
        self._last = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start reading."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take in what arrived."""
        self._buffer += data
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        """Stop serving: nobody listens any more."""
        if self._task is not None:
            self._task.cancel()
        self._transport = None
        self._lost(self)

    def _advance(self) -> None:
        if self._task is not None:
            return
        incoming = self._take_request()
        if incoming is not None:
            self._task = asyncio.get_running_loop().create_task(self._serve(self, incoming))
            self._task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled() or self._transport is None or self._transport.is_closing():
            return
        failure = task.exception()
        if failure is not None:
            logger.error("dspy_resilient.testing.serving_failed", exc_info=failure)
            self.abort()
        elif self._last:
            self.close()
        else:
            self._advance()

    def _take_request(self) -> Incoming | None:
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return None
            first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            del self._buffer[: end + 4]
            method, target, *_ = [*first.split(" "), "", ""]
            pairs = (line.partition(":") for line in lines)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            self._head = method, target, headers
        method, target, headers = self._head
        if "transfer-encoding" in headers:
            self.head(411, {}, 0)
            self.close()
            return None
        length = headers.get("content-length", "0")
        size = int(length) if length.isdecimal() else 0
        if len(self._buffer) < size:
            return None
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._head = None
        self._last = headers.get("connection", "").lower() == "close"
        return Incoming(method, target, headers, body)

    def head(
        self, status: int, headers: Mapping[str, str], length: int | None, body: bytes = b""
    ) -> None:
        """Send the response's head, and the body if it is at hand.

        Without a `length` the body goes in chunks of any number.
        """
        self._chunked = length is None
        try:
            phrase = http.HTTPStatus(status).phrase
        except ValueError:
            phrase = "Unknown"
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        lines = [f"HTTP/1.1 {status} {phrase}", framing]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)

    def body(self, data: bytes) -> None:
        """Send a part of the body."""
        if data:
            self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """Say that the body is complete."""
        if self._chunked:
            self._write(b"0\r\n\r\n")

    def close(self) -> None:
        """Close after what was written has left."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Reset the connection (RST); what was written may be lost."""
        if self._transport is not None:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTING_LINGER)
            self._transport.abort()

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()

    def descriptor(self) -> int | None:
        """Return the socket's file descriptor while it is open."""
        if self._transport is None:
            return None
        number = self._transport.get_extra_info("socket").fileno()
        return number if number >= 0 else None

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)
