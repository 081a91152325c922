"""What of a client survives saving: its policies and fallbacks, never a credential or a callable.

Used by pickling and by DSPy's `dump_state`/`load_state` alike. This module reads and writes plain
JSON-ready data; it opens no file.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import dspy

from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.policies import CachePolicy, CircuitPolicy, LimitPolicy, RetryPolicy
from dspy_resilient.redact import strip_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dspy_resilient.runtime import Options
    from dspy_resilient.target import Target


def dump_options(
    options: Options, given_name: str | None, fallbacks: Iterable[Target]
) -> dict[str, Any]:
    """Return a client's policies and fallbacks; callables are left out with a warning."""
    hooks = {"on_event": options.on_event, "store_if": options.cache.store_if}
    lost = [name for name, hook in hooks.items() if hook is not None]
    if lost:
        warnings.warn(
            f"ResilientLM {options.name!r}: {' and '.join(lost)} cannot be saved and must be given "
            "again",
            stacklevel=3,
        )
    circuit = options.circuit
    if isinstance(circuit, CircuitBreaker):
        circuit = circuit.policy
    return {
        "name": given_name,
        "cache": options.cache.dump(),
        "circuit": circuit.dump() if circuit is not None else False,
        "retry": options.retry.dump(),
        "limits": options.limits.dump() if options.limits is not None else None,
        "fallbacks": [_dump_fallback(target.lm) for target in fallbacks],
    }


def _dump_fallback(lm: Any) -> dict[str, Any]:
    state, _ = strip_secrets(lm.dump_state())
    return state


def load_options(state: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments that `dump_options` has put down."""
    return {
        **state,
        "cache": CachePolicy.load(state["cache"]),
        "circuit": CircuitPolicy.load(state["circuit"]) if state["circuit"] else False,
        "retry": RetryPolicy.load(state["retry"]),
        "limits": LimitPolicy.load(state["limits"]) if state["limits"] is not None else None,
        "fallbacks": [
            dspy.BaseLM.load_state(each, allow_custom_lm_class=True) for each in state["fallbacks"]
        ],
    }


def check_credentials(lm: Any, dropped: Iterable[str], kwargs: dict[str, Any]) -> None:
    """Raise LMConfigurationError for credentials that a save left out and nothing replaces."""
    provider = lm.model.partition("/")[0].upper()
    missing = [
        name
        for name in dropped
        if lm.kwargs.get(name) is None
        and kwargs.get(name) is None
        and not os.environ.get(name.upper())
        and not os.environ.get(f"{provider}_{name.upper()}")
    ]
    if missing:
        raise dspy.LMConfigurationError(
            f"{', '.join(missing)} was not saved with this LM, because a saved program holds no "
            "credential; set it in the environment or pass it again",
            model=lm.model,
            provider=provider.lower(),
        )
