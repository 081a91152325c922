"""The way to the providers, as far as it leads through LiteLLM."""

from dspy_resilient.providers.callback_event import CallbackEvent
from dspy_resilient.providers.clients import async_client, client
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
    prune,
    running_loop,
    within,
)
from dspy_resilient.providers.service import Service
from dspy_resilient.providers.wire import Ending

__all__ = [
    "AttemptWatch",
    "CallbackEvent",
    "Ending",
    "HttpClients",
    "PooledClient",
    "Service",
    "async_client",
    "client",
    "ensure_registered",
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
