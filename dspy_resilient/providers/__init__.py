"""The way to the providers, as far as it leads through LiteLLM."""

from dspy_resilient.providers.callback_event import CallbackEvent, home_of
from dspy_resilient.providers.leases import Connections
from dspy_resilient.providers.loop_end import async_client, tend
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
from dspy_resilient.providers.pool import client

__all__ = [
    "AttemptWatch",
    "CallbackEvent",
    "Connections",
    "async_client",
    "client",
    "ensure_registered",
    "home_of",
    "load",
    "loaded",
    "observe",
    "subscribe",
    "tend",
    "unregister",
    "watch",
]
