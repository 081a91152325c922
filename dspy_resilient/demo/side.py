"""One side of a demo: a way to call the model, its callers, and what they met."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

import dspy

from dspy_resilient.lm import ResilientLM

if TYPE_CHECKING:
    from dspy_resilient.testing import Fault, Provider

_GOOD = ("wonderful", "charming", "crisp")
_WORDS = (*_GOOD, "dreadful", "bland", "rude")
_THINGS = ("soup", "waiter", "salad", "view", "bread")
_OK = 200
_LATE = 1.0
"""Seconds after which a request without an answer counts as unanswered: the model takes 0.4."""


class Side:
    """One way to call the model.

    Args:
        name: Heads its column.
        lm: What the callers use.
        provider: The local provider that only this side calls, or None for a real one.
    """

    def __init__(self, name: str, lm: dspy.LM, provider: Provider | None) -> None:
        self.name = name
        self.lm = lm
        self.provider = provider
        self.answers = self.errors = self.waiting = 0
        self.slowest = 0.0
        self.last_error: BaseException | None = None
        self.first_answer: float | None = None
        self._program = dspy.Predict("review -> sentiment: Literal['positive', 'negative']")
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._back_at: float | None = None

    def call_until(self, over: threading.Event) -> None:
        """Make one call after the other; runs in several threads."""
        while not over.is_set():
            self.call()

    def call(self) -> None:
        """Make one call, and count what it met."""
        with self._lock:
            review = review_of(next(self._numbers))
            self.waiting += 1
        started = time.monotonic()
        error = None
        try:
            with dspy.context(lm=self.lm, adapter=dspy.ChatAdapter()):
                self._program(review=review)
        except Exception as failure:  # noqa: BLE001  # counting them is the point
            error = failure
        self._note(started, error)

    def _note(self, started: float, error: Exception | None) -> None:
        now = time.monotonic()
        with self._lock:
            self.waiting -= 1
            if error is not None:
                self.errors += 1
                self.last_error = error
                return
            self.answers += 1
            self.slowest = max(self.slowest, now - started)
            if self._back_at is not None and self.first_answer is None:
                self.first_answer = now - self._back_at

    def trouble(self, fault: Fault | None) -> None:
        """Let every request to this side's provider meet `fault`; None ends it."""
        if self.provider is None:
            return
        if fault is not None:
            self.provider.down(fault)
            return
        self.provider.up()
        self._back_at = time.monotonic()

    def close(self) -> None:
        """Close the client; a `ResilientLM` ends what its callers wait for, too."""
        if isinstance(self.lm, ResilientLM):
            self.lm.close(grace=0.0)
        else:
            self.lm.close()

    @property
    def requests(self) -> int | None:
        """Requests that the provider got; None for a real one."""
        return None if self.provider is None else self.provider.count

    @property
    def failed_requests(self) -> int | None:
        """Those that it did not answer; None for a real provider."""
        if self.provider is None:
            return None
        late = time.monotonic() - _LATE
        return sum(
            each.at < late if each.status is None else each.status != _OK
            for each in self.provider.requests
        )

    def column(self) -> list[str]:
        """Return the side's numbers, one for each of `ROWS`."""
        with self._lock:
            back = "-" if self.first_answer is None else f"{self.first_answer:.1f} s"
            counts = [f"{self.answers:,}", f"{self.errors:,}", f"{self.waiting:,}"]
            slowest = f"{self.slowest:.1f} s"
        sent = ["-" if n is None else f"{n:,}" for n in (self.requests, self.failed_requests)]
        return [*counts, *sent, slowest, back, circuit_of(self.lm)]


ROWS = (
    "answers",
    "calls lost",
    "calls under way",
    "requests sent",
    "  of them unanswered",
    "slowest answer",
    "first answer after the end",
    "circuit",
)


def review_of(number: int) -> str:
    """Return the text to judge in call `number`: each is another one."""
    return f"The {_THINGS[number % len(_THINGS)]} was {_WORDS[number % len(_WORDS)]}. ({number})"


def sentiment_of(review: str) -> str:
    """Return what the local model thinks of a review."""
    return "positive" if any(word in review for word in _GOOD) else "negative"


def circuit_of(lm: dspy.LM) -> str:
    """Return a circuit's state in words, "none" where there is none."""
    circuit = lm.circuit if isinstance(lm, ResilientLM) else None
    if circuit is None:
        return "none"
    remaining = circuit.open_remaining
    state = str(circuit.state).replace("_", " ")
    return f"{state} {remaining:.0f} s" if remaining else state
