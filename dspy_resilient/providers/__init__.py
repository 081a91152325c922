"""The way to the providers, as far as it leads through LiteLLM."""

from dspy_resilient.providers.callback_event import CallbackEvent, home_of
from dspy_resilient.providers.observer import (
    AttemptWatch,
    ensure_registered,
    load,
    loaded,
    observe,
    subscribe,
    unregister,
    watch,
)
from dspy_resilient.providers.pool import (
    HttpClients,
    PooledClient,
    async_client,
    client,
    prune,
    running_loop,
    within,
)

__all__ = [
    "AttemptWatch",
    "CallbackEvent",
    "HttpClients",
    "PooledClient",
    "async_client",
    "client",
    "ensure_registered",
    "home_of",
    "load",
    "loaded",
    "observe",
    "prune",
    "running_loop",
    "subscribe",
    "unregister",
    "watch",
    "within",
]
