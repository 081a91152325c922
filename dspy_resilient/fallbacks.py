"""Turn what a user gave as `fallbacks` into targets.

This module decides what a fallback inherits from the primary and refuses chains that lead back.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import dspy

from dspy_resilient.target import CONNECTION, Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dspy_resilient.runtime import Runtime

# Settings that some models refuse; a fallback is built without them if it does.
_NOT_EVERYWHERE = ("temperature", "max_tokens", "max_completion_tokens")


def build_fallbacks(primary: Any, runtime: Runtime, fallbacks: Sequence[Any]) -> tuple[Target, ...]:
    """Return the targets behind `primary`, in order; a `ResilientLM` brings its own along.

    Raises:
        TypeError: If one is no model name, LM or dict.
        ValueError: If one leads back to the primary or to an earlier fallback.
    """
    if isinstance(fallbacks, (str, dict)) or not hasattr(fallbacks, "__iter__"):
        raise TypeError(
            f"ResilientLM: fallbacks must be a list of models; got a {type(fallbacks).__name__}"
        )
    targets: list[Target] = []
    for fallback in fallbacks:
        for target in _targets(primary, runtime, fallback):
            if any(_same(target.lm, other) for other in (primary, *(t.lm for t in targets))):
                raise ValueError(
                    f"ResilientLM: fallbacks lead back to {target.lm.model!r}, which is asked already"
                )
            targets.append(target)
    return tuple(targets)


def _targets(primary: Any, runtime: Runtime, fallback: Any) -> Iterator[Target]:
    own = True
    if isinstance(fallback, dspy.BaseLM):
        lent = getattr(fallback, "lend_targets", None)
        if lent is not None:
            for target in lent():
                yield dataclasses.replace(target, runtime=runtime, own_connection=True)
            return
        lm = fallback
    elif isinstance(fallback, str):
        own = fallback.partition("/")[0] != primary.model.partition("/")[0]
        lm = _from_name(primary, fallback, inherits=not own)
    elif isinstance(fallback, dict):
        lm = dspy.LM(**{"engine": "litellm", **fallback})
    else:
        raise TypeError(
            "ResilientLM: a fallback must be a model name, a dspy.LM, a ResilientLM or a dict of "
            f"dspy.LM arguments; got a {type(fallback).__name__}"
        )
    yield Target(
        lm, runtime.fallback_routes, runtime, type(lm), primary.history, own_connection=own
    )


def _from_name(primary: Any, model: str, *, inherits: bool) -> Any:
    """Return an LM for `model` with the primary's settings, and its connection if it `inherits`."""
    settings = {
        name: value
        for name, value in primary.kwargs.items()
        if value is not None and (inherits or name not in CONNECTION)
    }
    if "max_completion_tokens" in settings:
        settings["max_tokens"] = settings.pop("max_completion_tokens")
    if isinstance(primary.engine, str):
        settings["engine"] = primary.engine
    settings["model_type"] = primary.model_type
    try:
        return dspy.LM(model, **settings)
    except dspy.LMConfigurationError:
        for name in _NOT_EVERYWHERE:
            settings.pop(name, None)
        return dspy.LM(model, **settings)


def _same(one: Any, other: Any) -> bool:
    return one is other or (
        (one.model, one.model_type) == (other.model, other.model_type)
        and one.kwargs == other.kwargs
    )
