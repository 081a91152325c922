"""What a model says, apart from any wire format, and what it was asked.

The dialects turn a `Turn` into bytes. Tokens are counted as words, so every number of usage can
be worked out by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Finish = Literal["stop", "length", "content_filter", "tool_calls"]


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool: its name and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments_json(self) -> str:
        """The arguments as most dialects send them: JSON in a string."""
        return json.dumps(self.arguments)


@dataclass(frozen=True)
class Reply:
    """One choice: text, thoughts and tool calls, and why the model stopped.

    `finish` may also be a provider's own word, as "network_error" or "MALFORMED_RESPONSE", or, of an
    answer in OpenAI's Responses format, "failed" or "cancelled", or "not done", with which Ollama's
    answers end early.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Finish | str = "stop"

    @classmethod
    def of(cls, said: object) -> Reply:
        """Return what an answer function returned as a Reply.

        Args:
            said: The text, a Reply, or a mapping with `text`, `reasoning` and `tool_calls`, a
                list of {"name", "arguments"} or of OpenAI's {"function": {"name", "arguments"}}.
        """
        if isinstance(said, Reply):
            return said
        if isinstance(said, str):
            return cls(said)
        if not isinstance(said, Mapping):
            raise TypeError(f"an answer must be a str, a mapping or a Reply; got {said!r}")
        calls = tuple(_tool_call(call) for call in said.get("tool_calls") or ())
        return cls(
            text=said.get("text") or "",
            reasoning=said.get("reasoning") or "",
            tool_calls=calls,
            finish="tool_calls" if calls else "stop",
        )

    def truncated(self) -> Reply:
        """Return the first half of it, stopped by the token limit."""
        words = pieces(self.text)
        return replace(self, text="".join(words[: len(words) // 2]), finish="length")

    @property
    def tokens(self) -> int:
        """Words in all of it."""
        tools = " ".join(f"{call.name} {call.arguments_json}" for call in self.tool_calls)
        return len(f"{self.reasoning} {self.text} {tools}".split())


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    inner = call.get("function", call)
    arguments = inner.get("arguments") or {}
    return ToolCall(
        inner["name"], json.loads(arguments) if isinstance(arguments, str) else arguments
    )


@dataclass(frozen=True)
class Turn:
    """One request and the choices to answer it with.

    Attributes:
        model: The model's name as the request gave it.
        body: The request's parsed body.
        replies: The choices; empty for an answer without any.
        number: The request's number, from which ids are made.
    """

    model: str
    body: Mapping[str, Any]
    replies: tuple[Reply, ...]
    number: int

    @property
    def prompt_tokens(self) -> int:
        """Words in the prompt, at least 1."""
        return max(1, sum(len(text.split()) for _, text in conversation(self.body)))

    @property
    def completion_tokens(self) -> int:
        """Words in all choices."""
        return sum(reply.tokens for reply in self.replies)


def pieces(text: str) -> list[str]:
    """Return `text` cut into words, each with the white space that follows it."""
    return re.findall(r"\s*\S+\s*", text) or [text]


def conversation(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (role, text) pairs of a request in any dialect; what is not text is left out."""
    system = body.get("system") or body.get("instructions") or body.get("systemInstruction")
    turns = [("system", _text(system))] if system else []
    for key in ("messages", "input", "contents", "prompt"):
        turns.extend(_turns(body.get(key)))
    return turns


def _turns(said: object) -> Iterator[tuple[str, str]]:
    if isinstance(said, str):
        yield "user", said
    elif isinstance(said, Sequence):
        for item in said:
            if isinstance(item, Mapping):
                yield str(item.get("role", "user")), _text(item)
            elif isinstance(item, str):
                yield "user", item


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        inner = next((content[k] for k in ("content", "parts", "text") if content.get(k)), "")
        return _text(inner)
    if isinstance(content, Sequence):
        return "\n".join(filter(None, map(_text, content)))
    return ""
