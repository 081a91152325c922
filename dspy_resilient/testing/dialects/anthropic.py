"""Anthropic's messages format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspy_resilient.testing.dialects.base import Dialect, event, message, raw_data
from dspy_resilient.testing.faults import ErrorKind
from dspy_resilient.testing.reply import Reply, Turn, pieces

_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

_MESSAGES: Mapping[ErrorKind, str] = {
    "quota": "Your credit balance is too low to access the Anthropic API.",
    "context_length": "prompt is too long: 209000 tokens > 200000 maximum",
    "content_filter": "Output blocked by content filtering policy",
}

_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


def _error(status: int, kind: ErrorKind) -> dict[str, Any]:
    text = _MESSAGES.get(kind) or message(status, kind)
    named = "billing_error" if kind == "quota" else _TYPES.get(status, "api_error")
    detail = {"type": named, "message": text}
    return {"type": "error", "error": detail, "request_id": "req_testing"}


def _blocks(turn: Turn, reply: Reply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.reasoning:
        blocks.append({"type": "thinking", "thinking": reply.reasoning, "signature": "testing"})
    if reply.text or not reply.tool_calls:
        blocks.append({"type": "text", "text": reply.text})
    blocks += [
        {
            "type": "tool_use",
            "id": f"toolu_{turn.number}_{i}",
            "name": call.name,
            "input": dict(call.arguments),
        }
        for i, call in enumerate(reply.tool_calls)
    ]
    return blocks


def _whole(turn: Turn) -> dict[str, Any]:
    reply = turn.replies[0] if turn.replies else None
    return {
        "id": f"msg_{turn.number}",
        "type": "message",
        "role": "assistant",
        "model": turn.model,
        "content": _blocks(turn, reply) if reply else [],
        "stop_reason": _REASONS[reply.finish if reply else "stop"],
        "stop_sequence": None,
        "usage": {
            "input_tokens": turn.prompt_tokens,
            "output_tokens": turn.completion_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        },
    }


def _deltas(block: dict[str, Any], call_json: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block as it starts, and what is then added to it."""
    match block["type"]:
        case "text":
            deltas = [{"type": "text_delta", "text": word} for word in pieces(block["text"])]
            return {**block, "text": ""}, deltas
        case "thinking":
            thoughts = pieces(block["thinking"])
            deltas = [{"type": "thinking_delta", "thinking": word} for word in thoughts]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
            return {**block, "thinking": "", "signature": ""}, deltas
        case _:
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": call_json}]


def _chunks(turn: Turn) -> list[bytes]:
    whole = _whole(turn)
    start = {**whole, "content": [], "stop_reason": None}
    start["usage"] = {**whole["usage"], "output_tokens": 1}
    pending = event({"type": "message_start", "message": start})
    calls = [call.arguments_json for reply in turn.replies[:1] for call in reply.tool_calls]
    chunks = []
    for index, block in enumerate(whole["content"]):
        call_json = calls.pop(0) if block["type"] == "tool_use" else ""
        opened, deltas = _deltas(block, call_json)
        pending += event({"type": "content_block_start", "index": index, "content_block": opened})
        for delta in deltas:
            chunk = event({"type": "content_block_delta", "index": index, "delta": delta})
            chunks.append(pending + chunk)
            pending = b""
        pending = event({"type": "content_block_stop", "index": index})
    ended = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    pending += event({"type": "message_delta", "delta": ended, "usage": whole["usage"]})
    return [*chunks, pending + event({"type": "message_stop"})]


MESSAGES = Dialect(_whole, _chunks, _error, raw_data)
