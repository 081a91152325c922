"""What a call may wait for: the steps that the generator of `call.py` yields.

One of the two drivers in `drive.py` performs each and hands back its result. An attempt is a step
too: sending it. Nothing is performed here.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from dspy_resilient.attempt import Attempt
    from dspy_resilient.clerk import Clerk

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wait:
    """Step: wait for `future`, at most `seconds`; its result is handed back, or None after that."""

    future: Future[Any] | None
    seconds: float = math.inf


@dataclass(frozen=True, slots=True)
class Prepare:
    """Step: do what the first attempt of a process needs (import LiteLLM), off every clock."""


@dataclass(frozen=True, slots=True)
class Disk:
    """Step: do `work`, which reads or writes a file; its result is handed back.

    On a loop, `clerk` does it.
    """

    clerk: Clerk
    work: Callable[[], Any]


if TYPE_CHECKING:
    Steps: TypeAlias = Generator[Wait | Prepare | Disk | Attempt, Any, T]
