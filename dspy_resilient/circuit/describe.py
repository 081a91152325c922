"""An error as a short text that may be shown: in errors, events, logs and shared state.

It keeps no exception, so neither a traceback nor the prompt in its frames outlives the call. What
looks like a credential is decided in `dspy_resilient.redact`.
"""

from __future__ import annotations

from dspy_resilient.redact import redact

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


def _masked(text: str) -> str:
    text = redact(" ".join(text[:_READ].split()))
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + "..."
