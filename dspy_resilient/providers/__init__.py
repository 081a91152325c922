"""The way to the providers, as far as it leads through LiteLLM."""

from dspy_resilient.providers.evidence import Evidence, home_of
from dspy_resilient.providers.leases import Connections
from dspy_resilient.providers.loops import async_client, tend
from dspy_resilient.providers.observer import (
    Sighting,
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
    "Connections",
    "Evidence",
    "Sighting",
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
