"""The states of a circuit. This module owns the names only; `machine.py` decides."""

from __future__ import annotations

from enum import StrEnum


class CircuitState(StrEnum):
    """What a circuit does with the next call.

    CLOSED lets it through and watches. OPEN refuses it until the next probe may go. HALF_OPEN: a
    probe may go, or is under way; one goes at a time. The forced states do the same whatever happens, until somebody calls
    `auto()` or `reset()` (or the time given to `force_open` is over).
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"
