"""Cohere's chat format, version 2. LiteLLM 1.110 reads its answers, but not its streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspy_resilient.testing.dialects.base import Dialect, event, message, raw_data
from dspy_resilient.testing.faults import ErrorKind
from dspy_resilient.testing.reply import Reply, Turn, pieces

_FINISH: Mapping[str, str] = {"length": "MAX_TOKENS", "tool_calls": "TOOL_CALL"}


def _said(turn: Turn) -> Reply:
    return turn.replies[0] if turn.replies else Reply()


def _end(turn: Turn) -> dict[str, Any]:
    tokens = {"input_tokens": turn.prompt_tokens, "output_tokens": turn.completion_tokens}
    finish = _FINISH.get(_said(turn).finish, "COMPLETE")
    return {"finish_reason": finish, "usage": {"tokens": tokens}}


def _message(reply: Reply) -> dict[str, Any]:
    said: dict[str, Any] = {
        "role": "assistant",
        "content": [{"type": "text", "text": reply.text}],
    }
    if reply.tool_calls:
        said["tool_calls"] = [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json},
            }
            for number, call in enumerate(reply.tool_calls)
        ]
    return said


def _whole(turn: Turn) -> dict[str, Any]:
    return {"id": f"chat-{turn.number}", "message": _message(_said(turn)), **_end(turn)}


def _chunks(turn: Turn) -> list[bytes]:
    words = [
        event(
            {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": word}}}}
        )
        for word in pieces(_said(turn).text)
    ]
    return [*words, event({"type": "message-end", "delta": _end(turn)})]


def _error(status: int, kind: ErrorKind) -> dict[str, Any]:
    return {"id": "error", "message": message(status, kind)}


CHAT = Dialect(_whole, _chunks, _error, raw_data)
