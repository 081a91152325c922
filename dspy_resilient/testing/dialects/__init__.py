"""Which wire format a request speaks, by the end of its path.

A dialect words an answer (whole or streamed) and an error. It sends nothing and decides nothing.
"""

from __future__ import annotations

from dspy_resilient.testing.dialects import anthropic, cohere, gemini, ollama, openai
from dspy_resilient.testing.dialects.base import Dialect

_BY_PATH = (
    ("/chat/completions", openai.CHAT),
    ("/completions", openai.TEXT),
    ("/responses", openai.RESPONSES),
    ("/embeddings", openai.EMBEDDINGS),
    ("/messages", anthropic.MESSAGES),
    (":generateContent", gemini.GENERATE),
    (":streamGenerateContent", gemini.GENERATE),
    ("/v2/chat", cohere.CHAT),
    ("/api/chat", ollama.CHAT),
    ("/api/generate", ollama.GENERATE),
)

_BASES = {
    "anthropic": "",
    "azure": "",
    "cohere": "/v2/chat",
    "gemini": "",
    "ollama": "",
    "ollama_chat": "",
    "groq": "/openai/v1",
}


def dialect_of(path: str) -> Dialect | None:
    """Return the dialect spoken at `path` (without query), or None if nobody speaks there."""
    return next((dialect for end, dialect in _BY_PATH if path.endswith(end)), None)


def base_path(provider: str) -> str:
    """Return what LiteLLM's `api_base` for a provider ends in; "/v1" unless known otherwise."""
    return _BASES.get(provider, "/v1")


__all__ = ["Dialect", "base_path", "dialect_of"]
