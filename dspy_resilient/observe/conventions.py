"""Calls in the words of OpenTelemetry's semantic conventions for generative AI.

Only names and values; it knows no span and no metric. Prompts and answers are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_resilient.progress import Call

# How LiteLLM and the conventions call the same provider, where they differ.
_PROVIDERS = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
_SETTINGS = (
    *("temperature", "top_p", "top_k", "max_tokens", "seed"),
    *("frequency_penalty", "presence_penalty"),
)
_USAGE = {
    "input": ("prompt_tokens", "input_tokens"),
    "output": ("completion_tokens", "output_tokens"),
}


def operation(lm: Any) -> dict[str, str]:
    """Return what a call of `lm` is: its kind, its provider, and the model asked for."""
    provider, slash, model = lm.model.partition("/")
    about = {
        "gen_ai.operation.name": "text_completion" if lm.model_type == "text" else "chat",
        "gen_ai.request.model": model if slash else lm.model,
    }
    if slash:
        about["gen_ai.provider.name"] = _PROVIDERS.get(provider, provider)
    return about


def settings(call: Call) -> dict[str, Any]:
    """Return what the request asks for, as far as it is plain numbers."""
    asked = {**call.targets[0].lm.kwargs, **call.kwargs}
    told: dict[str, Any] = {
        f"gen_ai.request.{name}": asked[name]
        for name in _SETTINGS
        if isinstance(asked.get(name), (int, float))
    }
    if isinstance(asked.get("n"), int) and asked["n"] > 1:
        told["gen_ai.request.choice.count"] = asked["n"]
    if call.streams:
        told["gen_ai.request.stream"] = True
    return told


def response(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what came back, from DSPy's history entry: model, id and why it ended."""
    answer = record.get("response")
    choices = getattr(answer, "choices", None) or ()
    reasons = [str(reason) for each in choices if (reason := getattr(each, "finish_reason", None))]
    told = {
        "gen_ai.response.model": record.get("response_model"),
        "gen_ai.response.id": getattr(answer, "id", None),
        "gen_ai.response.finish_reasons": reasons,
    }
    return {name: value for name, value in told.items() if value}


def usage(record: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of an answer, "input" and "output", as far as they are known."""
    told = record.get("usage") or {}
    found = {
        kind: next((told[name] for name in names if isinstance(told.get(name), int)), None)
        for kind, names in _USAGE.items()
    }
    return {kind: tokens for kind, tokens in found.items() if tokens is not None}
