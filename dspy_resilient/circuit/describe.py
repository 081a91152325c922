"""Errors and circuits as short texts that may be shown: in errors, events, logs and shared state.

It keeps no exception, so neither a traceback nor the prompt in its frames outlives the call. What
looks like a credential is decided in `dspy_resilient.redact`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dspy_resilient.circuit.state import CircuitState
from dspy_resilient.observe.latency import duration
from dspy_resilient.redact import redact

if TYPE_CHECKING:
    from dspy_resilient.circuit.machine import Machine

_LONGEST = 200
_READ = 2000


def describe(error: BaseException | str) -> str:
    """Return class, HTTP status and the start of the message of `error`, credentials masked.

    Never raises, whatever the error's own `__str__` does. A str is taken for the whole text.
    """
    if isinstance(error, str):
        return _masked(error)
    try:
        status = getattr(error, "status", None) or getattr(error, "status_code", None)
        text = _masked(str(error))
    except Exception:  # noqa: BLE001  # a broken error must not hide the failure
        status, text = None, ""
    name = type(error).__name__ + (f" {status}" if isinstance(status, int) else "")
    return f"{name}: {text}" if text else name


def condition(machine: Machine, now: float) -> str:
    """Return what state a circuit is in, since when, why, and until when."""
    state, wait = machine.seen(now), machine.wait(now)
    says = f"{state.replace('_', ' ')} for {duration(now - machine.since)}"
    if state == CircuitState.CLOSED:
        return says + (f", with {machine.failures} failures in a row" if machine.failures else "")
    if machine.reason and state != CircuitState.FORCED_CLOSED:
        says += f" ({machine.reason})"
    if state == CircuitState.HALF_OPEN:
        says += ", until probes have been answered"
    elif 0 < wait < math.inf:
        says += f", for {duration(wait)} more"
    else:
        says += ", until auto() or reset()"
    return says + (f"; last error: {machine.last_error}" if machine.last_error else "")


def _masked(text: str) -> str:
    text = redact(" ".join(text[:_READ].split()))
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + "..."
