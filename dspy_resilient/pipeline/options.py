"""What the shared part of a client is built from, in long form; what a user may give is `lm`'s."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_resilient.circuit import CircuitBreaker
    from dspy_resilient.events import Listener
    from dspy_resilient.policies import CachePolicy, CircuitPolicy, LimitPolicy, RetryPolicy

NOT_SAVED: Any = object()
"""In place of a store: what a client was saved with, and what must be given again."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything the shared part of a client is built from.

    Attributes:
        name: Name of the client.
        cache: What is remembered.
        circuit: When circuits open; None for no circuit; or a circuit shared on purpose.
        retry: How failed attempts are repeated.
        limits: How much is sent at a time, or None for no limit.
        on_event: The user's listener, or None.
        shared: The store to share through, as the user gave it, or None, or `NOT_SAVED`.
    """

    name: str
    cache: CachePolicy
    circuit: CircuitPolicy | CircuitBreaker | None
    retry: RetryPolicy
    limits: LimitPolicy | None = None
    on_event: Listener | None = None
    shared: Any = field(default=None, repr=False)

    @property
    def store(self) -> Any:
        """The store to share through, or None if there is none, or none yet."""
        return None if self.shared is NOT_SAVED else self.shared
