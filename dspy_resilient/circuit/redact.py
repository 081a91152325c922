"""An error as a short text that may be shown: in errors, events, logs and shared state.

A provider's message may quote the key it refused. This module masks what looks like a credential;
it keeps no exception, so neither a traceback nor the prompt in its frames outlives the call.
"""

from __future__ import annotations

import re

_LONGEST = 200
_READ = 2000

_MASK = "***"
_SECRETS = (
    # what follows a word that announces a credential: api_key=..., API key provided: ...
    re.compile(
        r"(?i)((?:key|token|secret|password|passwd|signature|credentials?|authorization)[\"']?"
        r"(?:\s+[a-z]+){0,3}\s*[:=]\s*[\"']?(?:(?:bearer|basic)\s+)?)[^\s\"',;&]{6,}"
    ),
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[^\s\"',;&]{6,}"),
    # user:password@ in an address
    re.compile(r"(://)[^/\s@]+(?=@)"),
    # the well-known prefixes
    re.compile(
        r"()\b(?:sk|pk|rk|gsk|xai|hf|r8|ghp|gho|pat|key|xox[a-z]|AIza|AKIA|ASIA|eyJ)"
        r"(?:[-_]|(?<=AIza)|(?<=AKIA)|(?<=ASIA)|(?<=eyJ))[\w\-.*]{6,}"
    ),
    # any long run of letters and digits mixed: no word, no model name
    re.compile(r"()(?<![\w/+])(?=[A-Za-z+/_]*\d)(?=[\d+/_]*[A-Za-z])[\w+/]{20,}={0,2}"),
)


def describe(error: BaseException | str | None) -> str | None:
    """Return class, HTTP status and the start of the message of `error`, credentials masked.

    Never raises, whatever the error's own `__str__` does. None stays None; a str is masked.
    """
    if error is None:
        return None
    if isinstance(error, str):
        return _masked(error)
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    name = type(error).__name__ + (f" {status}" if isinstance(status, int) else "")
    try:
        text = _masked(str(error))
    except Exception:  # noqa: BLE001  # a broken __str__ must not hide the failure
        text = ""
    return f"{name}: {text}" if text else name


def _masked(text: str) -> str:
    text = " ".join(text[:_READ].split())
    for secret in _SECRETS:
        text = secret.sub(rf"\1{_MASK}", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + "..."
