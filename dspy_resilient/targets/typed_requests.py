"""What a typed request asks for, as a fallback has it: its own settings in place of the primary's.

An adapter of DSPy 3.5 writes the primary's settings (`max_tokens`, `temperature`, ...) into each
request. Those are the primary's; what differs from them the caller has asked for, of whichever
model answers. This module reads settings, with DSPy's own reader; it sends nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dspy.lm15 import Config, request_from_openai_chat

_DEFAULTS = {each.name: getattr(Config(), each.name) for each in dataclasses.fields(Config)}


def with_own(config: Config, primary: Any, fallback: Any) -> Config:
    """Return `config`, made for a call on `primary`, as `fallback` should see it.

    What `fallback` was given as its own setting holds, unless the caller asked for another one: a
    value that is neither absent nor the primary's.
    """
    theirs, own = _settings(primary), _settings(fallback)
    changes = {
        name: own.get(name, default)
        for name, default in _DEFAULTS.items()
        if name != "extensions"
        and own.get(name, default) != getattr(config, name)
        and (name in own or name in theirs)
        and getattr(config, name) in (default, theirs.get(name, default))
    }
    return dataclasses.replace(config, **changes) if changes else config


def _settings(lm: Any) -> dict[str, Any]:
    """Return what `lm` was given of what a request may ask for, in the words of `Config`."""
    found: dict[str, Any] = {}
    for name, value in lm.kwargs.items():
        if value is None:
            continue
        try:
            request = request_from_openai_chat(
                {"model": lm.model, "messages": [{"role": "user", "content": "."}], name: value}
            )
        except Exception:  # noqa: BLE001, S112  # no setting of a request: a key, an address, ...
            continue
        read = request.config
        found |= {
            each: getattr(read, each)
            for each, default in _DEFAULTS.items()
            if getattr(read, each) != default
        }
    return found
