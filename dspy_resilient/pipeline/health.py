"""Whether a client would answer at present, as one frozen value. It asks and changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.targets.route import Route


class HealthState(StrEnum):
    """Whether calls are sent.

    READY: yes.
    OPEN: not to the primary at present: its circuit refuses.
    BROKEN: no; the client has broken too often and waits until it may be restarted.
    CLOSED: no more; `close` was called.
    """

    READY = "ready"
    OPEN = "open"
    BROKEN = "broken"
    CLOSED = "closed"


@dataclass(frozen=True, kw_only=True)
class Health:
    """A client's condition at one moment. It holds no setting of the client but name and model.

    Attributes:
        client: Name of the client.
        model: Model of its primary target.
        state: Whether calls are sent.
        retry_after: Seconds until that may change by itself, or None if unknown.
        in_flight: Calls under way, those that wait included.
        queued: How many of them wait for a place among the primary's attempts.
        restarts: Times the client was restarted so far.
        disk_errors: Faults of the cache's disk so far.
    """

    client: str
    model: str
    state: HealthState
    retry_after: float | None = None
    in_flight: int = 0
    queued: int = 0
    restarts: int = 0
    disk_errors: int = 0

    def _repr_html_(self) -> str:
        from dspy_resilient.stats.display import health_html  # noqa: PLC0415  # only when asked

        return health_html(self.client, self.model, self.state, self.in_flight, self.retry_after)


def health_of(client: ClientState, model: str, route: Route) -> Health:
    """Return the health of the client whose primary takes `route`."""
    totals = client.totals()
    left_alone = client.routes.supervisor.wait_time()
    refused = route.wait_time()
    wait = left_alone or refused
    if client.closed:
        state, wait = HealthState.CLOSED, 0.0
    elif left_alone > 0:
        state = HealthState.BROKEN
    else:
        state = HealthState.OPEN if refused > 0 else HealthState.READY
    return Health(
        client=client.name,
        model=model,
        state=state,
        retry_after=wait if 0 < wait < math.inf else None,
        in_flight=len(client.in_flight),
        queued=0 if route.limiter is None else route.limiter.queued,
        restarts=totals.restarts,
        disk_errors=sum(totals.disk_errors.values()),
    )
