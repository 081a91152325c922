"""Leave to make one call, which reports exactly once how it went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from dspy_resilient.outcomes.outcome import Outcome

if TYPE_CHECKING:
    from types import TracebackType

    from dspy_resilient.circuit.breaker import CircuitBreaker

_SUCCESS, _FAILURE, _NEUTRAL = Outcome.SUCCESS, Outcome.FAILURE, Outcome.NEUTRAL  # faster


class Permit:
    """Leave to make one call. The first report counts, on whatever thread; later ones do nothing.

    A report of an earlier generation (the circuit has opened, closed or been switched by hand
    since) changes nothing either, but for a success of an attempt that began after the trouble did:
    that is news, and closes an open circuit. A `with` block that ends without a report is neutral.
    A permit that is dropped without one is no harm: the next probe does not wait for it.

    Example:
        >>> from dspy_resilient.circuit import CircuitBreaker
        >>> from dspy_resilient.policies import CircuitPolicy
        >>> breaker = CircuitBreaker(CircuitPolicy())
        >>> with breaker.admit() as permit:
        ...     permit.failure()
        >>> breaker.failure_count
        1

    Attributes:
        circuit: The circuit that gave it.
        generation: The circuit's generation at the time.
        started_at: The clock's reading at the time.
        probe: Whether the call is a probe of an open circuit.
        reported: Whether the report is in.
    """

    __slots__ = ("circuit", "generation", "probe", "reported", "started_at")

    def __init__(
        self, circuit: CircuitBreaker, generation: int, started_at: float, probe: bool = False
    ) -> None:
        self.circuit = circuit
        self.generation = generation
        self.started_at = started_at
        self.probe = probe
        self.reported = False

    def success(self) -> None:
        """Report an answer. It counts as slow if it took `CircuitPolicy.slow_call` or longer."""
        self.circuit.record(self, _SUCCESS)

    def failure(
        self,
        error: BaseException | str | None = None,
        *,
        retry_after: float | None = None,
        reason: str = "failures",
    ) -> None:
        """Report that the provider failed.

        Args:
            error: What went wrong; only a redacted text of it is kept.
            retry_after: Seconds the provider asked to be left alone; if this failure opens the
                circuit, or is a probe's, the next probe goes no sooner than that.
            reason: Why the circuit is open if this failure opens it; "billing" does so at once.
        """
        self.circuit.record(self, _FAILURE, error, retry_after=retry_after, reason=reason)

    def neutral(self) -> None:
        """Report that the call says nothing about the provider."""
        self.circuit.record(self, _NEUTRAL)

    def __enter__(self) -> Self:
        """Return the permit itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Be neutral unless something was reported."""
        self.neutral()
