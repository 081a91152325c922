"""What every dialect is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dspy_resilient.testing.faults import ErrorKind
from dspy_resilient.testing.reply import Turn

CREATED = 1_750_000_000
"""The second at which every answer claims to have been made, so that answers are reproducible."""


@dataclass(frozen=True)
class Dialect:
    """How one endpoint words things.

    Attributes:
        whole: The body of an answer that is not streamed.
        chunks: The chunks of a streamed one: one per word, each with all that the dialect sends
            around it, then what follows the last word. None where nothing is streamed.
        error: The body of an error, from status and kind.
        raw_chunk: Frames arbitrary data as one event of a stream.
        stream_type: Content type of a stream.
        streams: Whether a request with this path and body asks for a stream.
    """

    whole: Callable[[Turn], Mapping[str, Any]]
    chunks: Callable[[Turn], list[bytes]] | None
    error: Callable[[int, ErrorKind], Mapping[str, Any]]
    raw_chunk: Callable[[str], bytes]
    stream_type: str = "text/event-stream"
    streams: Callable[[str, Mapping[str, Any]], bool] = lambda _, body: bool(body.get("stream"))


def data(value: object) -> bytes:
    """Return one unnamed server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def raw_data(text: str) -> bytes:
    """Return one unnamed server-sent event with `text` as it is."""
    return f"data: {text}\n\n".encode()


def event(value: Mapping[str, Any]) -> bytes:
    """Return one server-sent event named by its `type`."""
    return f"event: {value['type']}\n".encode() + data(value)


MESSAGES: Mapping[ErrorKind, str] = {
    "quota": "You exceeded your current quota, please check your plan and billing details.",
    "context_length": (
        "This model's maximum context length is 8192 tokens. "
        "However, your messages resulted in 9000 tokens."
    ),
    "content_filter": "Your request was rejected by the content management policy.",
}


def message(status: int, kind: ErrorKind) -> str:
    """Return what an error says to people."""
    return MESSAGES.get(kind) or f"The test provider answers {status}."
