"""How a request gets the money to be sent: reserved before, settled after.

Which budgets there are is for `budgets` to say, and what was billed for `stats.spending`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from dspy_resilient.budgets import Amount, BudgetStop, Hold, in_force
from dspy_resilient.errors import BudgetExceededError
from dspy_resilient.pipeline.state import Wait
from dspy_resilient.providers.prices import price_of

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dspy_resilient.budgets import Budget, Ledger, Meter
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.state import Call
    from dspy_resilient.providers.prices import Price
    from dspy_resilient.stats import Spending
    from dspy_resilient.targets.target import Target


class _Bound(NamedTuple):
    """A ledger that bounds a request.

    Attributes:
        ledger: The books.
        name: What people call it.
        budget: The block it belongs to, if it does.
        is_lent: Whether it is that of a fallback's own client, so that another target may do.
    """

    ledger: Ledger
    name: str
    budget: Budget | None = None
    is_lent: bool = False


class Funds:
    """What one request has reserved, in every budget that bounds it."""

    __slots__ = ("_amount", "_holds", "_meter", "_price", "_prompt")

    def __init__(
        self, holds: list[Hold], amount: Amount, meter: Meter, prompt: int, price: Price | None
    ) -> None:
        self._holds = holds
        self._amount = amount
        self._meter = meter
        self._prompt = prompt
        self._price = price

    def settle(self, spent: Spending) -> None:
        """Replace the reservation by what was billed; what nobody knows is taken to be as estimated."""
        if spent.unanswered:
            real = self._amount
        else:
            self._meter.learn(self._prompt, spent, self._price)
            dollars = self._amount.dollars if spent.dollars is None else spent.dollars
            real = Amount(dollars, spent.tokens, 1.0)
        for hold in self._holds:
            hold.settle(real)

    def release(self) -> None:
        """Give the reservation back: nothing was sent."""
        for hold in self._holds:
            hold.release()


def reserve(call: Call, client: ClientState, target: Target) -> Funds | Wait | None:
    """Reserve what a request to `target` will cost, in every budget; None if there is none.

    Returns:
        The funds; or what to wait for before asking again.

    Raises:
        BudgetExceededError: It does not fit.
        BudgetStop: It does not fit, and DSPy would take that error for a wrong answer.
    """
    bounds = _bounds(client, target)
    if not bounds:
        return None
    prompt, most = target.guess(call)
    meter, price = client.meter(target.label), price_of(target.lm.model)
    amount = meter.estimate(prompt, most, price)
    holds: list[Hold] = []
    for bound in bounds:
        found = _reserve(bound, amount, at_once=not call.may_wait)
        if isinstance(found, Hold):
            holds.append(found)
            continue
        for hold in holds:
            hold.release()
        if found is None:
            raise _refusal(client, bound, amount)
        return Wait(found, bound.ledger.patience)
    return Funds(holds, amount, meter, prompt, price)


def _bounds(client: ClientState, target: Target) -> list[_Bound]:
    """Return what bounds a request: the blocks around the caller, and the clients' own limits."""
    budgets, owner = in_force(), target.routes.client
    if not budgets and client.ledger is None and owner.ledger is None:
        return []
    bounds = [
        _Bound(budget.ledger, "the budget", budget)
        for budget in budgets
        if budget.covers(client) or budget.covers(owner)
    ]
    for state in (client, owner) if owner is not client else (client,):
        if state.ledger is not None:
            name = f"the budget of client {state.name!r}"
            bounds.append(_Bound(state.ledger, name, is_lent=state is not client))
    return bounds


def _reserve(bound: _Bound, amount: Amount, *, at_once: bool) -> Hold | Future[None] | None:
    if math.isnan(amount.dollars) and bound.ledger.limit.dollars != math.inf:
        return None
    return bound.ledger.reserve(amount, at_once=at_once)


def _refusal(client: ClientState, bound: _Bound, amount: Amount) -> BaseException:
    ledger = bound.ledger
    spent, reserved, limit = ledger.spent, ledger.reserved, ledger.limit
    unit = spent.plus(reserved).plus(amount).excess(limit) or "dollars"
    facts = {
        "spent": getattr(spent, unit),
        "reserved": getattr(reserved, unit),
        "limit": getattr(limit, unit),
    }
    estimate = getattr(amount, unit)
    if math.isnan(estimate):
        why = (
            "the price of this model is not known, so that dollars cannot be bounded: limit tokens "
            "or requests, or tell LiteLLM the price (litellm.register_model)"
        )
    else:
        why = (
            f"{facts['spent']:.6g} of {facts['limit']:.6g} {unit} are spent, "
            f"{facts['reserved']:.6g} are reserved for requests under way, and this one is "
            f"estimated at {estimate:.6g}"
        )
    error = BudgetExceededError(
        f"client {client.name!r}: {bound.name} does not allow this call: {why}",
        client=client.name,
        retry_after=ledger.retry_after,
        unit=unit,
        is_lent=bound.is_lent,
        **facts,
    )
    if bound.budget is None or bound.budget.is_direct:
        return error
    return BudgetStop(error, bound.budget)
