"""What is a credential, by its name or by its look.

The one place that says so, for saved state, pickles, cache keys and every text that people read.
This module changes nothing in place and knows no provider's configuration.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

_MASK = "***"

_BREAKS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
_ALONE = frozenset({"auth", "key", "pat", "pwd", "sig", "signature"})
_ANYWHERE = frozenset(
    [
        "apikey",
        "authorization",
        "bearer",
        "cookie",
        "cookies",
        "credential",
        "credentials",
        "jwt",
        "passphrase",
        "passwd",
        "password",
        "secret",
        "secrets",
    ]
)
_BEFORE_KEY = frozenset(
    [
        "access",
        "account",
        "api",
        "auth",
        "client",
        "encryption",
        "ingestion",
        "master",
        "oci",
        "private",
        "secret",
        "service",
        "signing",
        "ssh",
        "subscription",
        "virtual",
    ]
)
# A token that is counted, priced or part of a vocabulary is no credential.
_BEFORE_TOKEN = frozenset(
    [
        "add",
        "assistant",
        "audio",
        "bos",
        "cls",
        "end",
        "eos",
        "first",
        "image",
        "last",
        "mask",
        "max",
        "min",
        "new",
        "next",
        "pad",
        "per",
        "prefix",
        "reasoning",
        "sep",
        "special",
        "start",
        "stop",
        "suffix",
        "system",
        "think",
        "thinking",
        "tool",
        "turn",
        "unk",
        "video",
    ]
)
_AFTER_TOKEN = frozenset(
    [
        "budget",
        "cost",
        "count",
        "counts",
        "endpoint",
        "id",
        "ids",
        "index",
        "level",
        "limit",
        "price",
        "scope",
        "type",
        "types",
        "url",
        "usage",
    ]
)
# What points to a credential holds none.
_POINTS_TO_ONE = frozenset({"file", "name", "path", "ref", "uri", "url"})


@functools.lru_cache(maxsize=1024)
def is_secret(name: str) -> bool:
    """Whether a keyword, field or header of this name holds a credential.

    Example:
        >>> [is_secret(name) for name in ("api_key", "X-Api-Key", "azure_ad_token", "Cookie")]
        [True, True, True, True]
        >>> [is_secret(name) for name in ("max_tokens", "stop_token_ids", "prompt_cache_key")]
        [False, False, False]
    """
    words = [word.lower() for word in _BREAKS.split(name) if word]
    if not words or words[-1] in _POINTS_TO_ONE or "cost" in words:
        return False
    if not _ANYWHERE.isdisjoint(words) or (len(words) == 1 and words[0] in _ALONE):
        return True
    around = zip(["", *words], words, [*words[1:], ""], strict=False)
    return any(
        (word in ("key", "keys") and before in _BEFORE_KEY)
        or word.endswith("apikey")
        or (word == "token" and before not in _BEFORE_TOKEN and after not in _AFTER_TOKEN)
        for before, word, after in around
    )


def strip_secrets(settings: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return `settings` without the credentials, and the names of the settings left out.

    A setting that holds a credential further inside (a header, or the password in an address) is
    left out as a whole: half of it would be of no use. Unset (None) credentials stay, as there is
    nothing to hide.
    """
    dropped = tuple(name for name, value in settings.items() if _is_credential(name, value))
    return {name: value for name, value in settings.items() if name not in dropped}, dropped


def _is_credential(name: object, value: object, depth: int = 0) -> bool:
    """Whether `value`, as the value of `name`, is a credential or holds one further inside."""
    if value is None or isinstance(value, (bool, int, float)):
        return False
    # A field of a tool or of an answer may well be called "password": its description is no secret.
    is_described = depth > 0 and isinstance(value, Mapping) and not _OF_A_SCHEMA.isdisjoint(value)
    return (is_secret(str(name)) and not is_described) or _holds_secret(value, depth)


_OF_A_SCHEMA = frozenset({"$ref", "allOf", "anyOf", "const", "enum", "oneOf", "title", "type"})


def _holds_secret(value: object, depth: int) -> bool:
    if depth > 20:  # noqa: PLR2004  # deeper than any setting; a cycle ends here
        return True
    if isinstance(value, Mapping):
        return any(_is_credential(name, item, depth + 1) for name, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds_secret(item, depth + 1) for item in value)
    return isinstance(value, str) and (
        _KEY.search(value) is not None
        or ("://" in value and any(look.search(value) for look in (_USERINFO, _QUERY)))
    )


_USERINFO = re.compile(r"(?<=://)[^/\s\"'?#]{1,512}@")
_NAMED = (
    r"(?:api[-_ ]?key|(?:access|private|secret|subscription)[-_]?key|token(?!s)|secret|"
    r"passw(?:or)?d|authorization|credentials?|cookie)"
)
# ?key=... in an address
_QUERY = re.compile(
    rf"(?i)(?<=[?&])((?:[\w-]{{0,32}}{_NAMED})|auth|code|jwt|key|sig|signature)=[^\s&#\"']+"
)
# what the providers' own keys look like
_KEY = re.compile(
    r"\b(?:(?:sk|pk|rk|gsk|csk|xai|pplx|nvapi|glpat|r8|hf|gh[opsu]|github_pat)[-_][\w.*-]{6,}"
    r"|AIza[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|eyJ[\w-]{8,}(?:\.[\w-]+)*)"
)
_LOOKS = (
    # user:password@ in an address
    (_USERINFO, f"{_MASK}@"),
    # Authorization: Bearer ...
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=*-]{6,}"), rf"\1 {_MASK}"),
    (_QUERY, rf"\1={_MASK}"),
    # api_key=..., "x-api-key": "...", API key provided: ...
    (
        re.compile(
            rf"(?i)({_NAMED}[\"']?(?: provided)?\s{{0,4}}[:=]\s{{0,4}})"
            rf"(?!\s|[\"']?{re.escape(_MASK)}|(?:bearer|basic)\b)[\"']?[^\s\"',;&)}}\]]{{4,}}"
        ),
        rf"\1{_MASK}",
    ),
    (_KEY, _MASK),
)


def redact(text: str) -> str:
    """Return `text` with everything that looks like a credential masked by `***`.

    Example:
        >>> redact("401 from https://me:pw@host/v1?key=abc: Incorrect API key provided: sk-abc123xyz")
        '401 from https://***@host/v1?key=*** Incorrect API key provided: ***'
    """
    for look, mask in _LOOKS:
        text = look.sub(mask, text)
    return text


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
