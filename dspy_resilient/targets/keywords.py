"""Which keywords are ours, and which look as if they were meant to be.

Every other keyword is the provider's, and goes there as with `dspy.LM`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import dspy

if TYPE_CHECKING:
    from collections.abc import Iterable

_ME = "ResilientLM"
FALLBACKS = ("fallbacks", "context_window_fallbacks", "policy_fallbacks")
OF_THE_CLIENT = frozenset(
    {*FALLBACKS, "cache_policy", "circuit", "limits", "name", "on_event", "retry", "shared"}
)
OURS = OF_THE_CLIENT | {"max_wait", "deadline"}
_LONG = 10  # letters from which on two of them may be wrong

# Names that DSPy, LiteLLM or a provider takes, though they are near one of ours.
_OF_OTHERS = frozenset({"callback", "callbacks", "event", "limit", "names", "share"})
# What the policies are called elsewhere than among the arguments.
_ALSO_CALLED = {"cache_policy": "cache", "circuit_breaker": "circuit", "circuit_policy": "circuit"}


def refuse_stream(kwargs: dict[str, Any]) -> None:
    """Raise LMUnsupportedFeatureError for stream=True, whose answer is no answer yet."""
    if kwargs.get("stream"):
        raise dspy.LMUnsupportedFeatureError(
            "stream=True is not a setting of an LM call; wrap the program with dspy.streamify",
            features=["stream"],
        )


def refuse_ours(where: str, kwargs: dict[str, Any]) -> None:
    """Raise TypeError for an argument of ours where only a provider's settings are taken."""
    if not OURS.isdisjoint(kwargs):
        raise TypeError(
            f"{_ME}: {where} takes no {', '.join(sorted(OURS & kwargs.keys()))}; give it to the "
            "client (max_wait and deadline also to a copy)"
        )
    refuse_misspelt(kwargs)


def refuse_misspelt(names: Iterable[str]) -> None:
    """Raise TypeError for a name that is nearly one of ours: it would be sent, and do nothing."""
    for name in names:
        if meant := meant_by(name):
            raise TypeError(
                f"{_ME}: there is no setting {name!r}; did you mean {meant!r}? (What a provider shall "
                "get under such a name goes into extra_body.)"
            )


@lru_cache(maxsize=1024)
def meant_by(name: str) -> str | None:
    """Return the name of ours that `name` is a typing mistake for, or None.

    Example:
        >>> meant_by("max_wiat"), meant_by("maxWait"), meant_by("fallback")
        ('max_wait', 'max_wait', 'fallbacks')
        >>> meant_by("max_wait"), meant_by("max_tokens"), meant_by("seed")
        (None, None, None)
    """
    if name in _ALSO_CALLED:
        return _ALSO_CALLED[name]
    if name in OURS or name in _OF_OTHERS or name.startswith("_"):
        return None
    plain = _plain(name)
    for ours in sorted(OURS):
        wanted = _plain(ours)
        most = 2 if len(wanted) >= _LONG else 1
        if abs(len(plain) - len(wanted)) <= most and _distance(plain, wanted) <= most:
            return ours
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _distance(one: str, other: str) -> int:
    """Return how many letters are wrong, missing, too many, or changed places with the next.

    The optimal string alignment distance (Damerau, 1964).
    """
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            steps = [before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted)]
            if i > 1 and j > 1 and (letter, one[i - 2]) == (other[j - 2], wanted):
                steps.append(last[j - 2] + 1)
            row.append(min(steps))
    return row[-1]
