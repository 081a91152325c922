"""What one client shares with its like in other processes, and under which keys.

A key holds the version of this format, the store's namespace and the client's name, so that those
never mix; model, endpoint and credential are in it only as a salted hash. The hash is in braces:
what belongs to one endpoint lies on one node of a cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dspy_resilient._support.canonical import stand_in
from dspy_resilient.providers.endpoint import Endpoint
from dspy_resilient.shared.answers import SharedAnswers
from dspy_resilient.shared.circuit import SharedCircuit
from dspy_resilient.shared.gate import SharedGate
from dspy_resilient.shared.ledger import SharedLedger
from dspy_resilient.shared.link import Contact, Courier
from dspy_resilient.shared.rates import SharedRates
from dspy_resilient.shared.redis import RedisStore
from dspy_resilient.shared.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.budgets import Amount
    from dspy_resilient.policies import CircuitPolicy, LimitPolicy

_FORMAT = "dspy_resilient:2"
_SCHEMES = ("redis://", "rediss://", "valkey://", "valkeys://", "unix://")


def open_store(shared: Any) -> Store:
    """Return the store that a user means by `shared`; connect to nothing yet.

    Raises:
        TypeError: If it is no address, client or store.
        ValueError: If it is an address that makes no sense; it is not shown, for its password.
        ImportError: If redis-py is missing for an address.
    """
    allowed = "ResilientLM: shared must be " + ", ".join(_SCHEMES) + " with an address, a Redis or "
    allowed += "Valkey client, or a Store"
    if isinstance(shared, str):
        if not shared.startswith(_SCHEMES):
            raise ValueError(f"{allowed}; got another str")
        try:
            return RedisStore.at(shared)
        except (TypeError, ValueError):
            raise ValueError(f"{allowed}; got an address that makes no sense") from None
    if isinstance(shared, type):
        raise TypeError(
            f"{allowed}, or None; got the class {shared.__name__}, not one of its objects"
        )
    if hasattr(shared, "command_stack"):
        raise TypeError(
            f"{allowed}, or None; got a pipeline, which sends nothing until it is executed"
        )
    if isinstance(shared, Store):
        return shared
    if not hasattr(shared, "evalsha"):
        raise TypeError(f"{allowed}, or None; got a {type(shared).__name__}")
    if ".asyncio" in type(shared).__module__:
        raise TypeError(
            "ResilientLM: shared must be a client without asyncio; got one with it. Event loops "
            "are not blocked by either"
        )
    return RedisStore(shared)


class SharedState:
    """The shared part of one client.

    Args:
        shared: What the user gave; see `open_store`.
        name: Name of the client.
        clock: Monotonic seconds.
        emit: Told what happens to the store.
    """

    def __init__(
        self,
        shared: Any,
        name: str,
        *,
        clock: Callable[[], float],
        emit: Callable[..., object],
    ) -> None:
        self._store = store = open_store(shared)
        self._opened = store is not shared
        self._space = (store.namespace, name)
        self._contact = Contact(clock=clock, emit=emit)
        self._courier = Courier(store, self._contact)

    def circuit(self, endpoint: Endpoint, policy: CircuitPolicy, **facts: Any) -> SharedCircuit:
        """Return the circuit of one endpoint."""
        return SharedCircuit(self._courier, self._key(endpoint, "circuit"), policy, **facts)

    def gate(self, endpoint: Endpoint, credential: str, **facts: Any) -> SharedGate:
        """Return the throttle gate of one credential on one endpoint."""
        return SharedGate(self._courier, self._key(endpoint, "throttle", credential), **facts)

    def rates(self, endpoint: Endpoint, credential: str, policy: LimitPolicy) -> SharedRates:
        """Return the rates of one credential on one endpoint."""
        key = self._key(endpoint, "rate", credential)
        return SharedRates(self._courier, key, policy.rpm, policy.tpm)

    def client_ledger(self, limit: Amount, seconds: float) -> SharedLedger:
        """Return the books of what all clients of this name may spend in a period."""
        key = self._key(Endpoint("", ""), "spend", str(seconds))
        return SharedLedger(self._courier, key, limit, seconds)

    def ledger(self, name: str, limit: Amount) -> SharedLedger:
        """Return the books of the budget of this name, whatever the clients are called."""
        namespace = quote(self._space[0], safe="")
        digest = stand_in(name, f"{_FORMAT} {namespace}".encode())[:32]
        return SharedLedger(self._courier, f"{_FORMAT}:{namespace}::{{{digest}}}:spend", limit)

    def answers(self, kept: float) -> SharedAnswers:
        """Return the cached answers of all clients of this name.

        They have a courier of their own: a long answer holds up no circuit.
        """
        courier = Courier(self._store, self._contact)
        return SharedAnswers(courier, self._key(Endpoint("", ""), "cache"), kept)

    def close(self) -> None:
        """Close the connections that were opened for this client."""
        if self._opened:
            self._store.close()

    def _key(self, endpoint: Endpoint, kind: str, credential: str | None = None) -> str:
        namespace, name = (quote(each, safe="") for each in self._space)
        key = f"{_FORMAT}:{namespace}:{name}:{{{self._digest(repr(endpoint))}}}:{kind}"
        return key if credential is None else f"{key}:{self._digest(credential)}"

    def _digest(self, text: str) -> str:
        salt = f"{_FORMAT} {self._space}".encode()
        return stand_in(text, salt)[:32]
