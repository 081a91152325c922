"""What a store of shared state can do, and the words in which it is asked.

A verb is atomic and says everything in one go: a client reports what it has seen, says what it
believes and may ask for something, and the answer is how things stand now. There is no get and no
set, so two clients cannot overwrite each other. This module knows no particular store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from dspy_resilient.circuit import CircuitState
from dspy_resilient.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dspy_resilient.budgets import Amount
    from dspy_resilient.policies import CircuitPolicy

KEPT = 86_400.0
"""Seconds after its last use at which a store forgets a piece of state."""


MOST_TEXT = 2**20
"""Bytes of one answer that a store keeps at most."""


FASTEST_FOR = 60.0
"""Seconds for which the largest rate that a client has reported is that of all its clients."""


class StoreAnswerError(Exception):
    """A store's answer makes no sense."""


class CircuitVerdict(NamedTuple):
    """How one call ended, or `number` successes in a row.

    Attributes:
        outcome: What it says about the provider.
        age: Seconds since the attempt began; of several, since the youngest did.
        number: How many successes, if it is one.
        slow: How many of them were slow.
        reason: Why the circuit is open if this failure opens it.
        error: Redacted text of the failure.
        retry_after: Seconds the provider asked to be left alone, as far as that counts.
        late: Seconds since it ended; of several, since the last did. A client that makes few calls
            tells of a success with its next call: it must not end a run that began meanwhile.
    """

    outcome: Outcome
    age: float
    number: int = 1
    slow: int = 0
    reason: str | None = None
    error: str | None = None
    retry_after: float | None = None
    late: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitReport:
    """What a client believes of a circuit, has seen of the provider, and asks for.

    Attributes:
        generation: The generation it believes in, as the store gave it; None if the client has
            changed the state by itself since.
        state: The state it believes in.
        age: Seconds since that state began.
        remaining: Seconds until the next probe may go; inf for never.
        run_age: Seconds since the run's first attempt to fail had begun.
        failures: Failures in a row.
        share: Share of failures among the last verdicts.
        reason: Why it last opened.
        error: Redacted text of the last failure.
        verdicts: How calls ended, oldest first; failures of that generation only.
        probe: Whether it asks for leave to send a probe.
        draw: A number from 0 to below 1, for the jitter.
    """

    generation: int | None
    state: CircuitState
    age: float
    remaining: float
    run_age: float
    failures: int
    share: float
    reason: str | None
    error: str | None
    verdicts: tuple[CircuitVerdict, ...] = ()
    probe: bool = False
    draw: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitView:
    """How a circuit stands once a report has been heard.

    Attributes:
        generation: Stamp of the last change: microseconds of the store's clock, ever growing. 0
            if nothing has changed yet.
        granted: Whether the client may send the probe that it asked for.
        state: As in the report, and so are the others.
    """

    generation: int
    granted: bool
    state: CircuitState
    age: float
    remaining: float
    run_age: float
    failures: int
    share: float
    reason: str | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleReport:
    """What a client has to say of a throttle gate.

    Attributes:
        seconds: How long it has closed the gate for, after a 429 that the store has not heard of;
            0 for no such.
        hint: Seconds the provider asked for with it, however many; 0 if it did not say.
        reset: Whether all earlier closings are to be forgotten.
    """

    seconds: float = 0.0
    hint: float = 0.0
    reset: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleView:
    """How a throttle gate stands once a report has been heard.

    Attributes:
        at: The store's clock.
        stamp: Stamp of the last change: microseconds of the store's clock, ever growing. 0 if
            nothing has changed yet.
        seconds: How long the gate stays closed.
        hint: How long the provider wants to be left alone, however long that is.
        longer: Whether that is longer than what the report said.
    """

    at: float
    stamp: int
    seconds: float
    hint: float
    longer: bool


class RateReport(NamedTuple):
    """What a client takes from a rate.

    Attributes:
        per_minute: The rate.
        amount: How much it takes, ahead of sending it; what is negative it gives back.
        believed: Seconds after which it believes the rate to be full again, without that.
    """

    per_minute: float
    amount: float
    believed: float = 0.0


class RateView(NamedTuple):
    """How rates stand once a report has been heard.

    Attributes:
        at: The store's clock.
        full_in: Seconds after which each is full again, by name; negative for since when it is.
    """

    at: float
    full_in: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendReport:
    """What one member of a budget has spent, holds for requests under way, and asks for.

    Attributes:
        member: Its name.
        spent: What it has spent in all; so a report that is heard twice counts once.
        held: What it holds, without what it asks for.
        wants: What it asks for, one request each; what does not fit is passed over.
        limit: The most of each unit; inf for no limit.
        lease: Seconds after which what it holds counts as spent, unless it reports again.
        kept: Seconds for which the books are kept.
    """

    member: str
    spent: Amount
    held: Amount
    wants: tuple[Amount, ...] = ()
    limit: Amount
    lease: float
    kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendView:
    """How a budget stands once a report has been heard.

    Attributes:
        at: The store's clock.
        spent: What all members have spent.
        reserved: What all of them hold, what has been granted included.
        granted: What of the wants has been granted, together.
    """

    at: float
    spent: Amount
    reserved: Amount
    granted: Amount


class CacheOrder(NamedTuple):
    """What a client wants done with the answers that it shares.

    Attributes:
        doing: "load" an answer, "store" one, "forget" one, or forget all.
        name: Its name: a cache key; "" for all.
        text: The answer, to keep.
        kept: Seconds after which it is of no use; inf for never.
    """

    doing: Literal["load", "store", "forget", "forget_all"]
    name: str = ""
    text: bytes = b""
    kept: float = math.inf


class CachedText(NamedTuple):
    """An answer that a client has recalled.

    Attributes:
        age: Seconds since it was kept, by the store's clock.
        text: The answer, from whomever.
    """

    age: float
    text: bytes


class Verb(NamedTuple):
    """A verb of a `Store`, to be carried out.

    Attributes:
        name: Which.
        arguments: What it takes.
    """

    name: Literal["circuit", "throttle", "rate", "spend", "cache"]
    arguments: tuple[Any, ...]


@runtime_checkable
class Store(Protocol):
    """State that several clients have in common. Verbs may block; any exception is a fault.

    Each verb takes effect at once and as a whole, by the store's own clock. What nobody uses is
    forgotten after a day.

    Attributes:
        namespace: What keeps environments apart that use the same store; "" for none.
    """

    namespace: str

    def circuit(self, key: str, policy: CircuitPolicy, report: CircuitReport) -> CircuitView:
        """Hear `report` about the circuit `key`, and return how it stands.

        The newest change that anybody knows of counts: a client that knows of a later one than
        the store (which was emptied, restored or out of reach) is believed. Failures of an
        earlier generation change nothing.
        """
        ...

    def throttle(self, key: str, report: ThrottleReport) -> ThrottleView:
        """Hear `report` about the throttle gate `key`, and return how it stands.

        The latest end that anybody has reported counts, whatever the order of the reports.
        """
        ...

    def rate(self, key: str, reports: Mapping[str, RateReport]) -> RateView:
        """Take what `reports` say from the rates `key`, by name, and return how they stand.

        It is taken at once, into debt if need be, and whoever takes it waits until it has been
        paid for: see `limits.rate.TokenBucket`. So all clients together keep within each rate. Where
        they differ in it, the largest counts here, and each keeps within its own by itself: a
        client with a smaller one holds up no other.
        """
        ...

    def spend(self, key: str, report: SpendReport) -> SpendView:
        """Hear `report` about the budget `key`, grant what fits of it, and return how it stands."""
        ...

    def cache(self, key: str, orders: Sequence[CacheOrder]) -> list[CachedText | None]:
        """Carry out `orders` on the answers of the client `key`, and return what each recalls.

        What is longer than `MOST_TEXT` is not recalled.
        """
        ...

    def together(self, verbs: Sequence[Verb]) -> list[Any]:
        """Carry out several verbs, in one trip if there is a way to go, and return what each does.

        Where one fails, its exception is in its place; one that is raised is the fault of all.
        """
        ...

    def close(self) -> None:
        """Release connections; the store can still be used."""
        ...
