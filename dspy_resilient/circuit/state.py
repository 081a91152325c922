"""The words of the circuit: how a call can end, and what a circuit can be.

This module owns the names only. Who decides on an outcome is `outcome.py`; what follows from it is
`machine.py`.
"""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """What a finished call says about the provider.

    A neutral one says nothing: it counts nowhere and resets nothing.
    """

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


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
