"""Google's generateContent format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspy_resilient.testing.dialects.base import Dialect, data, message, raw_data
from dspy_resilient.testing.faults import ErrorKind
from dspy_resilient.testing.reply import Reply, Turn, pieces

_STATES: Mapping[int, str] = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

_REASONS = {"length": "MAX_TOKENS", "content_filter": "SAFETY"}


def _error(status: int, kind: ErrorKind) -> dict[str, Any]:
    state = _STATES.get(status, "INTERNAL")
    return {"error": {"code": status, "message": message(status, kind), "status": state}}


def _body(turn: Turn, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "candidates": candidates,
        "modelVersion": turn.model,
        "responseId": f"gemini-{turn.number}",
        "usageMetadata": {
            "promptTokenCount": turn.prompt_tokens,
            "candidatesTokenCount": turn.completion_tokens,
            "totalTokenCount": turn.prompt_tokens + turn.completion_tokens,
        },
    }


def _candidate(index: int, parts: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
    candidate = {"index": index, "content": {"role": "model", "parts": parts}}
    return candidate if finish is None else {**candidate, "finishReason": finish}


def _parts(reply: Reply, text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if reply.reasoning:
        parts.append({"text": reply.reasoning, "thought": True})
    if text or not reply.tool_calls:
        parts.append({"text": text})
    return parts + [
        {"functionCall": {"name": call.name, "args": dict(call.arguments)}}
        for call in reply.tool_calls
    ]


def _finish(reply: Reply) -> str:
    return _REASONS.get(reply.finish, reply.finish if reply.finish.isupper() else "STOP")


def _whole(turn: Turn) -> dict[str, Any]:
    return _body(
        turn,
        [_candidate(i, _parts(r, r.text), _finish(r)) for i, r in enumerate(turn.replies)],
    )


def _chunks(turn: Turn) -> list[bytes]:
    chunks: list[bytes] = []
    for index, reply in enumerate(turn.replies):
        words = pieces(reply.text)
        first = _parts(reply, words[0])
        parts = [first, *([{"text": word}] for word in words[1:])]
        chunks += [data(_body(turn, [_candidate(index, part, None)])) for part in parts]
    ends = [_candidate(i, [{"text": ""}], _finish(r)) for i, r in enumerate(turn.replies)]
    return [*chunks, data(_body(turn, ends))]


def _streams(path: str, _: Mapping[str, Any]) -> bool:
    return path.endswith(":streamGenerateContent")


GENERATE = Dialect(_whole, _chunks, _error, raw_data, streams=_streams)
