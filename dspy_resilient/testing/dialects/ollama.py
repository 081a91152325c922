"""Ollama's chat and generate formats; a stream is one JSON object per line, and the default."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dspy_resilient.testing.dialects.base import Dialect, message
from dspy_resilient.testing.faults import ErrorKind
from dspy_resilient.testing.reply import Reply, Turn, pieces

_NOW = "2025-06-15T15:06:40Z"


def _error(status: int, kind: ErrorKind) -> dict[str, Any]:
    return {"error": message(status, kind)}


def _head(turn: Turn) -> dict[str, Any]:
    return {"model": turn.model, "created_at": _NOW}


def _end(turn: Turn, reply: Reply) -> dict[str, Any]:
    if reply.finish == "not done":
        return {"done": False}
    return {
        "done": True,
        "done_reason": "length" if reply.finish == "length" else "stop",
        "total_duration": 1,
        "prompt_eval_count": turn.prompt_tokens,
        "eval_count": turn.completion_tokens,
    }


def _said(turn: Turn) -> Reply:
    return turn.replies[0] if turn.replies else Reply()


def _chat_piece(text: str, reply: Reply | None = None) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": text}
    if reply is not None and reply.tool_calls:
        said["tool_calls"] = [
            {"function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in reply.tool_calls
        ]
    return {"message": said}


def _generate_piece(text: str, reply: Reply | None = None) -> dict[str, Any]:
    if reply is not None and reply.tool_calls:  # there are no tools here: LiteLLM asks for JSON
        call = reply.tool_calls[0]
        text += json.dumps({"name": call.name, "arguments": dict(call.arguments)})
    return {"response": text}


def _dialect(piece: Callable[..., dict[str, Any]]) -> Dialect:
    def whole(turn: Turn) -> dict[str, Any]:
        reply = _said(turn)
        return {**_head(turn), **piece(reply.text, reply), **_end(turn, reply)}

    def chunks(turn: Turn) -> list[bytes]:
        reply = _said(turn)
        values = [{**_head(turn), **piece(word), "done": False} for word in pieces(reply.text)]
        if reply.finish != "not done":
            values.append({**_head(turn), **piece("", reply), **_end(turn, reply)})
        return [_raw(json.dumps(value)) for value in values]

    return Dialect(whole, chunks, _error, _raw, "application/x-ndjson", _streams)


def _raw(text: str) -> bytes:
    return f"{text}\n".encode()


def _streams(_: str, body: Mapping[str, Any]) -> bool:
    return bool(body.get("stream", True))


CHAT = _dialect(_chat_piece)
GENERATE = _dialect(_generate_piece)
