"""What of a client survives saving: its policies and fallbacks, never a credential or a callable.

Used by pickling and by DSPy's `dump_state`/`load_state` alike. This module reads and writes plain
JSON-ready data; it opens no file.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import dspy

from dspy_resilient._support.redact import is_secret, strip_secrets
from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.pipeline.options import NOT_SAVED
from dspy_resilient.policies import CachePolicy, CircuitPolicy, LimitPolicy, RetryPolicy
from dspy_resilient.targets.keywords import FALLBACKS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dspy_resilient.pipeline.options import Options
    from dspy_resilient.targets.fallbacks import Given

STATE_KEY = "resilient"
STORE_VARIABLE = "DSPY_RESILIENT_STORE"
TRAINING = ("launch_kwargs", "train_kwargs")
_CLASS_KEY = "_dspy_lm_class"
_CLEAN = {STATE_KEY, "engine", "async_engine"}  # an engine's state holds no secret by its contract

# Whose libraries look for credentials beyond the environment: profiles, roles, metadata servers.
_LOOKS_FURTHER = ("bedrock", "sagemaker", "vertex_ai")
# The variables that LiteLLM reads, by setting and, for `api_key`, by provider.
_VARIABLES = {
    "aws_access_key_id": "AWS_ACCESS_KEY_ID",
    "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "aws_session_token": "AWS_SESSION_TOKEN",
    "azure_ad_token": "AZURE_AD_TOKEN",
}
_API_KEYS = {
    **{
        name: f"{name.upper()}_API_KEY"
        for name in (
            *("anthropic", "azure", "cerebras", "cohere", "deepseek", "fireworks_ai", "gemini"),
            *("groq", "huggingface", "mistral", "nvidia_nim", "openai", "openrouter"),
            *("replicate", "xai"),
        )
    },
    "perplexity": "PERPLEXITYAI_API_KEY",
    "together_ai": "TOGETHERAI_API_KEY",
}
# Where the variables of a provider begin otherwise than its name does.
_ALSO_CALLED = {
    "cohere": "CO_",
    "cohere_chat": "CO_",
    "gemini": "GOOGLE_",
    "huggingface": "HF_",
    "openrouter": "OR_",
    "perplexity": "PERPLEXITYAI_",
    "volcengine": "ARK_",
    "watsonx": "WX_",
}


def savable(settings: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Return what may be saved, and the names of the credentials and of the callables left out."""
    kept, secrets = strip_secrets(settings)
    hooks = tuple(n for n, value in kept.items() if callable(value) and not isinstance(value, type))
    return {name: value for name, value in kept.items() if name not in hooks}, secrets, hooks


def clean_state(
    state: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Return an LM's state without what may not be saved, and the names of what is left out.

    Args:
        state: What DSPy's `dump_state` returned.
        kwargs: The LM's settings, which are in the state too.

    Returns:
        The state; the credentials that calls will miss; what only a warning needs to name.
    """
    kept, secrets, lost = savable(kwargs)
    state = {name: value for name, value in state.items() if name in kept or name not in kwargs}
    for name in TRAINING:
        if name in state:
            state[name], own, hooks = savable(state[name])
            lost = (*lost, *own, *hooks)
    _, others = strip_secrets({n: value for n, value in state.items() if n not in _CLEAN})
    return {n: v for n, v in state.items() if n not in others}, secrets + others, lost


def dump_options(
    options: Options,
    given_name: str | None,
    fallbacks: dict[str, Given],
    lost: Iterable[str] = (),
) -> dict[str, Any]:
    """Return a client's policies and fallbacks; what is `lost`, and any hook, only a warning names."""
    shared = options.shared
    keeps = isinstance(shared, str) and not strip_secrets({"shared": shared})[1]
    hooks: dict[str, Any] = {"on_event": options.on_event, "store_if": options.cache.store_if}
    if not keeps and shared is not NOT_SAVED:
        hooks["shared"] = shared
    lost = sorted({*lost, *(name for name, hook in hooks.items() if hook is not None)})
    if lost:
        warnings.warn(
            f"ResilientLM {options.name!r}: {' and '.join(lost)} cannot be saved and must be given "
            "again",
            stacklevel=4,
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
        "shared": shared if keeps else None,
        "store_not_saved": shared is not None and not keeps,
        **{
            name: [each if isinstance(each, str) else _dump_fallback(each) for each in given]
            for name, given in fallbacks.items()
        },
    }


def load_options(state: dict[str, Any], kind: Any, *, allow_custom: bool) -> dict[str, Any]:
    """Return the constructor arguments that `dump_options` has put down.

    Args:
        state: What `dump_options` returned.
        kind: The class of the client, which it and its bases need no leave to load.
        allow_custom: Whether other classes that a fallback names may be imported.
    """
    state = dict(state)
    is_missing = state.pop("store_not_saved", False)
    return {
        **state,
        "shared": _load_store(is_missing, state),
        "cache": CachePolicy.load(state["cache"]),
        "circuit": CircuitPolicy.load(state["circuit"]) if state["circuit"] else False,
        "retry": RetryPolicy.load(state["retry"]),
        "limits": LimitPolicy.load(state["limits"]) if state["limits"] is not None else None,
        **{
            name: [
                each
                if isinstance(each, str)
                else _load_fallback(each, kind, allow_custom=allow_custom)
                for each in state[name]
            ]
            for name in FALLBACKS
        },
    }


def _load_store(is_missing: bool, state: dict[str, Any]) -> Any:
    """Return the store that was saved, or else that of the environment; warn if there is none."""
    if not is_missing:
        return state["shared"]
    if store := os.environ.get(STORE_VARIABLE):
        return store
    whose = f"ResilientLM {state['name']!r}" if state["name"] else "ResilientLM"
    warnings.warn(
        f"{whose}: it shares nothing for now, since its store was not "
        f"saved (a client, or an address with a password); set {STORE_VARIABLE} before it is loaded, "
        "or go on with lm.copy(shared=...)",
        stacklevel=4,
    )
    return NOT_SAVED


def _dump_fallback(lm: Any) -> dict[str, Any]:
    state, secrets, _ = clean_state(lm.dump_state(), lm.kwargs)
    return {"lm": state, "dropped": sorted({*getattr(lm, "_dropped", ()), *secrets})}


def _load_fallback(state: dict[str, Any], kind: Any, *, allow_custom: bool) -> Any:
    path = state["lm"].get(_CLASS_KEY)
    known = (each for each in kind.__mro__ if f"{each.__module__}.{each.__qualname__}" == path)
    lm = next(known, dspy.BaseLM).load_state(state["lm"], allow_custom_lm_class=allow_custom)
    if state["dropped"]:
        lm._dropped = tuple(state["dropped"])  # noqa: SLF001  # for `check_credentials`
    return lm


def check_credentials(lm: Any, given: dict[str, Any]) -> None:
    """Raise LMConfigurationError for what a save left out of `lm` and nothing replaces.

    Args:
        lm: An LM that was rebuilt from a save.
        given: The keywords of a call, which may replace it.
    """
    provider = lm.model.partition("/")[0] if "/" in lm.model else "openai"
    missing = [
        name
        for name in getattr(lm, "_dropped", ())
        if lm.kwargs.get(name) is None and given.get(name) is None and not _is_set(name, provider)
    ]
    if missing:
        raise dspy.LMConfigurationError(
            f"{', '.join(missing)} was not saved with this LM, because a saved program holds no "
            f"credential; {_advice(missing, provider)}",
            model=lm.model,
            provider=provider,
        )


def _advice(missing: list[str], provider: str) -> str:
    """Say what can be done about each: a variable is named only if LiteLLM reads it."""
    read = {name: variable for name in missing if (variable := _variable(name, provider))}
    given = [name for name in missing if name not in read]
    ways = [f"set {' and '.join(read.values())} in the environment"] if read else []
    if read and not given:
        return f"{ways[0]}, or pass it again (to a call or to lm.copy)"
    return " and ".join([*ways, f"pass {' and '.join(given)} again (to a call or to lm.copy)"])


def _variable(name: str, provider: str) -> str | None:
    if name in _VARIABLES:
        return _VARIABLES[name]
    return _API_KEYS.get(provider) if name == "api_key" else None


def _is_set(name: str, provider: str) -> bool:
    """Whether the environment has what was left out: that very setting, or another credential."""
    full = provider.upper()
    names = [name.upper(), f"{full}_{name.upper()}"]
    if name in ("api_base", "base_url"):
        names += [f"{full}_API_BASE", f"{full}_BASE_URL"]
    if any(os.environ.get(each) for each in names):
        return True
    if not is_secret(name):
        return False
    stem = full.removesuffix("_AI")
    stems = (f"{stem}_", f"{full.replace('_', '')}_", _ALSO_CALLED.get(provider, f"{full}_"))
    return provider in _LOOKS_FURTHER or any(
        value and each.startswith(stems) and is_secret(each) for each, value in os.environ.items()
    )
