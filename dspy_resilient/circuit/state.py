"""The states of a circuit. This module owns the names only; `machine.py` decides."""

from __future__ import annotations

from enum import StrEnum


class CircuitState(StrEnum):
    """What a circuit does with the next call.

    CLOSED lets it through and watches. OPEN refuses it until its time is over. HALF_OPEN lets a
    few through as probes. The forced states do the same whatever happens, until somebody calls
    `auto()` or `reset()` (or the time given to `force_open` is over).
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"
