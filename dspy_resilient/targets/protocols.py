"""What targets read of a client and of a call; both are made, and kept, by `pipeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.budgets import Ledger
    from dspy_resilient.circuit import CircuitBreaker
    from dspy_resilient.limits import Limiter, ThrottleGate
    from dspy_resilient.policies import CircuitPolicy
    from dspy_resilient.providers.endpoint import Endpoint, Place
    from dspy_resilient.shared import SharedState
    from dspy_resilient.targets.route import Routes
    from dspy_resilient.targets.target import Target


class Client(Protocol):
    """The client whose targets these are; see `pipeline.client.ClientState`."""

    name: str
    closed: bool
    lost: set[str]
    clock: Callable[[], float]
    tenant: str | None
    circuit_policy: CircuitPolicy | None
    shared_state: SharedState | None
    ledger: Ledger | None
    fallback_routes: Routes

    def new_circuit(
        self, label: str, endpoint: Endpoint | None = None, **changes: Any
    ) -> CircuitBreaker:
        """Return a circuit of the client's policy."""
        ...

    def new_gate(self, label: str, place: Place) -> ThrottleGate:
        """Return an open throttle gate."""
        ...

    def new_limiter(self, label: str, place: Place) -> Limiter | None:
        """Return a limiter of the client's policy, or None without one."""
        ...


class Call(Protocol):
    """What a user asked for; see `pipeline.state.Call`."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    settings: dict[str, Any]
    key: str | None
    targets: tuple[Target, ...]
