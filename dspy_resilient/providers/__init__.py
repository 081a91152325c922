"""The way to the providers, as far as it leads through LiteLLM."""

from dspy_resilient.providers.evidence import Evidence
from dspy_resilient.providers.leases import Connections
from dspy_resilient.providers.loops import tend
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

__all__ = [
    "Connections",
    "Evidence",
    "Sighting",
    "ensure_registered",
    "load",
    "loaded",
    "observe",
    "subscribe",
    "tend",
    "unregister",
    "watch",
]
