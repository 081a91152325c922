"""What one target is sent at a time and per minute.

`Limiter` hands out places (`Slot`) in strict arrival order, to threads and event loops alike. It
composes `bulkhead` (attempts under way, fixed or adaptive) with `rate` (requests and tokens per
minute). Nothing here waits, sleeps, logs, or knows what is sent.
"""

from dspy_resilient.limits.limiter import Limiter
from dspy_resilient.limits.rate import Rates
from dspy_resilient.limits.slot import Slot
from dspy_resilient.limits.throttle_gate import GatePermit, ThrottleGate

__all__ = ["GatePermit", "Limiter", "Rates", "Slot", "ThrottleGate"]
