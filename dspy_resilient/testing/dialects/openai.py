"""OpenAI's formats, also spoken by Azure, Groq, vLLM, OpenRouter and many more."""

from __future__ import annotations

import base64
import hashlib
import itertools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from dspy_resilient.testing.dialects.base import CREATED, Dialect, data, event, message, raw_data
from dspy_resilient.testing.faults import ErrorKind
from dspy_resilient.testing.reply import Reply, ToolCall, Turn, pieces

# LiteLLM reads these texts, so they are worded as OpenAI words them.
_ERRORS: Mapping[object, tuple[str, str | None, str | None]] = {
    "quota": ("insufficient_quota", "insufficient_quota", None),
    "context_length": ("invalid_request_error", "context_length_exceeded", None),
    "content_filter": ("invalid_request_error", "content_policy_violation", None),
    400: ("invalid_request_error", None, None),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided: none."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests."),
}


def _error(status: int, kind: ErrorKind) -> dict[str, Any]:
    type_, code, text = _ERRORS.get(kind) or _ERRORS.get(status) or ("api_error", None, None)
    text = text or message(status, kind)
    return {"error": {"message": text, "type": type_, "param": None, "code": code}}


def _usage(turn: Turn) -> dict[str, Any]:
    return {
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": turn.completion_tokens,
        "total_tokens": turn.prompt_tokens + turn.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": sum(len(reply.reasoning.split()) for reply in turn.replies)
        },
    }


def _head(turn: Turn, object_: str, prefix: str = "chatcmpl") -> dict[str, Any]:
    # LiteLLM's groq route fails on an answer without service_tier.
    return {
        "id": f"{prefix}-{turn.number}",
        "object": object_,
        "created": CREATED,
        "model": turn.model,
        "system_fingerprint": "fp_testing",
        "service_tier": "default",
    }


def _tools(turn: Turn, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{turn.number}_{i}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments_json},
        }
        for i, call in enumerate(calls)
    ]


def _logprobs(text: str) -> dict[str, Any]:
    return {
        "content": [
            {"token": word, "logprob": -0.1, "bytes": list(word.encode()), "top_logprobs": []}
            for word in pieces(text)
        ],
        "refusal": None,
    }


def _chat_choice(turn: Turn, index: int, reply: Reply) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.tool_calls:
        said |= {"content": reply.text or None, "tool_calls": _tools(turn, reply.tool_calls)}
    if reply.reasoning:
        said["reasoning_content"] = reply.reasoning
    choice = {"index": index, "message": said, "finish_reason": reply.finish, "logprobs": None}
    if turn.body.get("logprobs"):
        choice["logprobs"] = _logprobs(reply.text)
    return choice


def _chat(turn: Turn) -> dict[str, Any]:
    choices = [_chat_choice(turn, i, reply) for i, reply in enumerate(turn.replies)]
    return {**_head(turn, "chat.completion"), "choices": choices, "usage": _usage(turn)}


def _deltas(turn: Turn, reply: Reply) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": word} for word in pieces(reply.reasoning) if word
    ]
    deltas += [{"content": word} for word in pieces(reply.text) if word]
    deltas += [
        {"tool_calls": [{"index": i, **call}]}
        for i, call in enumerate(_tools(turn, reply.tool_calls))
    ]
    deltas = deltas or [{"content": ""}]
    deltas[0] = {"role": "assistant", **deltas[0]}
    return deltas


def _chat_chunks(turn: Turn) -> list[bytes]:
    head = _head(turn, "chat.completion.chunk")

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
        return data({**head, "choices": [choice]})

    streams = [[chunk(i, d) for d in _deltas(turn, r)] for i, r in enumerate(turn.replies)]
    chunks = [b"".join(row) for row in itertools.zip_longest(*streams, fillvalue=b"")]
    tail = [chunk(i, {}, reply.finish) for i, reply in enumerate(turn.replies)]
    return [*chunks, b"".join([*tail, *_usage_chunk(turn, head), b"data: [DONE]\n\n"])]


def _usage_chunk(turn: Turn, head: dict[str, Any]) -> list[bytes]:
    wanted = (turn.body.get("stream_options") or {}).get("include_usage")
    return [data({**head, "choices": [], "usage": _usage(turn)})] if wanted else []


def _text_choice(turn: Turn, index: int, text: str, finish: str | None) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "finish_reason": finish,
        "logprobs": None,
    }
    if turn.body.get("logprobs") is not None:
        words = pieces(text)
        offsets = itertools.accumulate((len(word) for word in words[:-1]), initial=0)
        choice["logprobs"] = {
            "tokens": words,
            "token_logprobs": [-0.1] * len(words),
            "top_logprobs": [{word: -0.1} for word in words],
            "text_offset": list(offsets),
        }
    return choice


def _text(turn: Turn) -> dict[str, Any]:
    choices = [_text_choice(turn, i, r.text, r.finish) for i, r in enumerate(turn.replies)]
    return {**_head(turn, "text_completion", "cmpl"), "choices": choices, "usage": _usage(turn)}


def _text_chunks(turn: Turn) -> list[bytes]:
    head = _head(turn, "text_completion", "cmpl")
    chunks = [
        data({**head, "choices": [_text_choice(turn, i, word, None)]})
        for i, reply in enumerate(turn.replies)
        for word in pieces(reply.text)
    ]
    ends = [
        data({**head, "choices": [_text_choice(turn, i, "", reply.finish)]})
        for i, reply in enumerate(turn.replies)
    ]
    return [*chunks, b"".join([*ends, *_usage_chunk(turn, head), b"data: [DONE]\n\n"])]


def _items(turn: Turn, reply: Reply) -> list[dict[str, Any]]:
    n = turn.number
    items: list[dict[str, Any]] = []
    if reply.reasoning:
        summary = [{"type": "summary_text", "text": reply.reasoning}]
        items.append({"type": "reasoning", "id": f"rs_{n}", "summary": summary})
    if reply.text or not reply.tool_calls:
        part = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": []}
        said = {"type": "message", "id": f"msg_{n}", "role": "assistant", "content": [part]}
        items.append({**said, "status": _status(reply)})
    items += [
        {
            "type": "function_call",
            "id": f"fc_{n}_{i}",
            "call_id": f"call_{n}_{i}",
            "name": call.name,
            "arguments": call.arguments_json,
            "status": "completed",
        }
        for i, call in enumerate(reply.tool_calls)
    ]
    return items


def _status(reply: Reply) -> str:
    if reply.finish in {"failed", "cancelled"}:
        return reply.finish
    return "incomplete" if reply.finish in {"length", "content_filter"} else "completed"


def _trouble(reply: Reply | None) -> dict[str, str] | None:
    is_failed = reply is not None and reply.finish == "failed"
    return {"code": "server_error", "message": "The model failed."} if is_failed else None


def _responses(turn: Turn) -> dict[str, Any]:
    reply = turn.replies[0] if turn.replies else None
    reason = {"length": "max_output_tokens"}.get(reply.finish, reply.finish) if reply else None
    incomplete = reply is not None and _status(reply) == "incomplete"
    usage = _usage(turn)
    return {
        "id": f"resp_{turn.number}",
        "object": "response",
        "created_at": CREATED,
        "model": turn.model,
        "status": _status(reply) if reply else "completed",
        "error": _trouble(reply),
        "incomplete_details": {"reason": reason} if incomplete else None,
        "instructions": turn.body.get("instructions"),
        "metadata": turn.body.get("metadata") or {},
        "output": _items(turn, reply) if reply else [],
        "parallel_tool_calls": True,
        "temperature": turn.body.get("temperature"),
        "tool_choice": turn.body.get("tool_choice") or "auto",
        "tools": turn.body.get("tools") or [],
        "top_p": turn.body.get("top_p"),
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        },
    }


def _vector(text: str, dimensions: int) -> list[float]:
    digest = hashlib.shake_128(text.encode()).digest(dimensions)
    return [byte / 128 - 1 for byte in digest]


def _embeddings(turn: Turn) -> dict[str, Any]:
    asked = turn.body.get("input") or []
    texts = [asked] if isinstance(asked, str) else [str(text) for text in asked]
    vectors = [_vector(text, turn.body.get("dimensions") or 8) for text in texts]
    coded: list[Any] = vectors
    if turn.body.get("encoding_format") == "base64":
        coded = [base64.b64encode(array("f", v).tobytes()).decode() for v in vectors]
    return {
        "object": "list",
        "model": turn.model,
        "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(coded)],
        "usage": {"prompt_tokens": turn.prompt_tokens, "total_tokens": turn.prompt_tokens},
    }


def _responses_chunks(turn: Turn) -> list[bytes]:
    whole = _responses(turn)
    numbers = itertools.count()

    def named(type_: str, **facts: Any) -> bytes:
        return event({"type": type_, "sequence_number": next(numbers), **facts})

    chunks = [named("response.created", response={**whole, "status": "in_progress", "output": []})]
    for i, item in enumerate(whole["output"]):
        at = {"output_index": i, "item_id": item["id"]}
        chunks[-1] += named("response.output_item.added", output_index=i, item=item)
        if item["type"] == "message":
            for word in pieces(item["content"][0]["text"]):
                text = named("response.output_text.delta", **at, content_index=0, delta=word)
                chunks.append(text)
        chunks.append(named("response.output_item.done", output_index=i, item=item))
    return [*chunks, named(f"response.{whole['status']}", response=whole)]


CHAT = Dialect(_chat, _chat_chunks, _error, raw_data)
TEXT = Dialect(_text, _text_chunks, _error, raw_data)
RESPONSES = Dialect(_responses, _responses_chunks, _error, raw_data)
EMBEDDINGS = Dialect(_embeddings, None, _error, raw_data)
