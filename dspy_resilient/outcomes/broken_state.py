"""Notices state of our own that is broken, where it is used."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from dspy_resilient.errors import BrokenStateError, ResilienceError

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


def needs_intact_state(method: Callable[P, T]) -> Callable[P, T]:
    """Have whatever `method` raises that is no error of ours raised as BrokenStateError.

    For methods that raise nothing but our own errors on purpose and call no code of the user's.
    """

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except (ResilienceError, MemoryError, RecursionError):
            raise
        except Exception as error:
            where = method.__qualname__
            raise BrokenStateError(
                f"{where} found state that it cannot be in: {error!r}"
            ) from error

    return guarded
