"""What OpenAI's reasoning models (o-series, gpt-5 family) take of settings made for another model.

They take no temperature but 1, count their thinking as part of the answer, so that a small
`max_tokens` leaves no answer at all, and call it `max_completion_tokens`. Which models these are,
DSPy knows. Whoever chose one hears from DSPy of a setting that does not fit; where a call meets
one as a fallback, this module leaves that setting out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import dspy
from dspy.clients.lm import LM  # by reference: a program may put another class at dspy.LM

_LEAST_TOKENS = 16_000  # DSPy's own bound
_NAMES = ("max_tokens", "max_completion_tokens")


@functools.lru_cache(maxsize=512)
def is_reasoning(model: Any) -> bool:
    """Whether DSPy counts `model` among OpenAI's reasoning models."""
    try:
        LM(model, temperature=0.5)
    except dspy.LMConfigurationError:
        return True
    except ValueError:  # the name of somebody's own LM, which DSPy has no rule for
        return False
    return False


def fit(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings`, made for another model, as `model` takes them."""
    given = settings.keys() & {"temperature", *_NAMES}
    if not given:
        return settings
    reasons = is_reasoning(model)
    fitting = {name: value for name, value in settings.items() if name not in given}
    temperature = settings.get("temperature")
    if "temperature" in given and not (reasons and _is_refused(temperature)):
        fitting["temperature"] = temperature
    tokens = next((settings[name] for name in _NAMES if settings.get(name) is not None), None)
    if tokens is not None and not (reasons and tokens < _LEAST_TOKENS):
        fitting["max_completion_tokens" if reasons else "max_tokens"] = tokens
    return fitting


def fit_config(model: str, config: dspy.lm15.Config) -> dspy.lm15.Config:
    """Return the settings of a typed request as `model` takes them."""
    if not is_reasoning(model):
        return config
    few = config.max_tokens is not None and config.max_tokens < _LEAST_TOKENS
    return dataclasses.replace(
        config,
        temperature=None if _is_refused(config.temperature) else config.temperature,
        max_tokens=None if few else config.max_tokens,
    )


def _is_refused(temperature: float | None) -> bool:
    return temperature is not None and temperature != 1
