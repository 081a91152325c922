"""A budget: what the calls inside a `with` block may spend together.

The block lies in DSPy's settings, which DSPy itself hands on to the threads of `dspy.Parallel`,
`Evaluate` and `asyncify`. This module says which budgets are in force and how a block ends; the
ledger keeps the books.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Self

import dspy
from dspy.utils.callback import BaseCallback

from dspy_resilient.budgets.ledger import UNLIMITED, Amount, Ledger
from dspy_resilient.policies import number, text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from dspy_resilient.errors import BudgetExceededError

_SETTING = "dspy_resilient_budgets"
_blocks_seen: set[bool] = set()
_blocks: ContextVar[tuple[ExitStack, ...]] = ContextVar("dspy_resilient_blocks", default=())
_direct: ContextVar[tuple[Budget, ...]] = ContextVar("dspy_resilient_direct", default=())


class Budget:
    """What calls may spend together: `with Budget(lm, judge, dollars=4.0) as budget:`.

    Bounds every call made inside the block: on this thread, in tasks, in threads with a copied
    context, and in DSPy's own workers. A plain thread that was started inside has to enter the
    block itself. Several threads and tasks may, and the block may be entered again later: what was
    spent stays spent. Blocks inside blocks count for each.

    Before a request is sent its cost is estimated and reserved, and afterwards replaced by what
    the provider billed. A call that does not fit raises BudgetExceededError, and nothing is sent;
    one that may fit once others have settled waits for those. Answers from the cache cost nothing
    and go on. So the limit is exceeded at most by what requests under way cost beyond their
    estimates.

    DSPy's optimizers and evaluations take an error for a wrong answer and go on. So there, and in
    DSPy's worker threads, a call that does not fit raises BudgetStop, which they let pass; it
    leaves the block as BudgetExceededError.

    Args:
        *clients: The `ResilientLM`s whose calls count, their copies and fallbacks too. None: all.
        dollars: The most dollars, or None (default) for any number. Above 0.
        tokens: The most tokens, prompt and answer together, or None (default). Above 0.
        requests: The most requests sent, those that fail too, or None (default). At least 1.
        name: Where a client shares a store (`shared=`), budgets of one name are one budget, in all
            processes and as long as anything is spent from it within 30 days. None (default): this
            object alone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, or nothing is limited.
    """

    def __init__(
        self,
        *clients: Any,
        dollars: float | None = None,
        tokens: float | None = None,
        requests: int | None = None,
        name: str | None = None,
    ) -> None:
        me = "Budget"
        number(me, "dollars", dollars, above=True, optional=True)
        number(me, "tokens", tokens, above=True, optional=True)
        number(me, "requests", requests, low=1, whole=True, optional=True)
        text(me, "name", name)
        given = (dollars, tokens, requests)
        if given == (None, None, None):
            raise ValueError(f"{me}: one of dollars, tokens and requests must be given")
        self._owners = tuple(_owner(each) for each in clients)
        limit = Amount(*(math.inf if each is None else each for each in given))
        self._ledger = self._open(limit, name)

    def _open(self, limit: Amount, name: str | None) -> Ledger:
        if name is None:
            return Ledger(limit)
        stores = [each.shared_state for each in self._owners if each.shared_state is not None]
        if not stores:
            raise ValueError("Budget: name needs a client with shared=; got none that shares")
        ledger: Ledger = stores[0].ledger(name, limit)
        return ledger

    @property
    def limit(self) -> Amount:
        """The most of each unit; inf where nothing is limited."""
        return self._ledger.limit

    @property
    def spent(self) -> Amount:
        """What has been spent: `spent.dollars` (nan if a price is unknown), `.tokens`, `.requests`."""
        return self._ledger.spent

    @property
    def reserved(self) -> Amount:
        """What is reserved for requests under way."""
        return self._ledger.reserved

    @property
    def left(self) -> Amount:
        """What may still be spent, reservations apart; never below 0."""
        rest = self.limit.minus(self.spent).minus(self.reserved)
        return Amount(*(max(0.0, each) for each in rest))

    def __enter__(self) -> Self:
        """Bound the calls of this thread or task from now on."""
        _blocks_seen.add(True)
        stack = ExitStack()
        callbacks = [*(dspy.settings.get("callbacks") or ()), _InsideDspy()]
        block = {_SETTING: (*in_force(), self), "callbacks": callbacks}
        stack.enter_context(dspy.context(**block))
        stack.enter_context(_set(_direct, (*_direct.get(), self)))
        _blocks.set((*_blocks.get(), stack))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Bound them no more; a stop of this budget leaves as BudgetExceededError."""
        *others, stack = _blocks.get()
        _blocks.set(tuple(others))
        stack.close()
        stop = _find_stop(error)
        if stop is not None and stop.budget is self and self not in _direct.get():
            raise stop.error from None

    def __repr__(self) -> str:
        """Return limit, spending and reservations of what is limited."""
        told = (
            f"{unit}={most:g} (spent {spent:g}, reserved {reserved:g})"
            for unit, most, spent, reserved in zip(
                Amount._fields, self.limit, self.spent, self.reserved, strict=True
            )
            if most != math.inf
        )
        return f"Budget({', '.join(told)})"

    def covers(self, owner: Any) -> bool:
        """Whether the calls of a client with this inner part count."""
        return not self._owners or owner in self._owners

    @property
    def ledger(self) -> Ledger:
        """Its books."""
        return self._ledger

    @property
    def is_direct(self) -> bool:
        """Whether the caller stands in the block itself, and not in DSPy's workers or optimizers."""
        return self in _direct.get()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this very budget: a copy would be other money."""
        return self


def in_force() -> tuple[Budget, ...]:
    """Return the budgets of the blocks that enclose the caller, outermost first."""
    if not _blocks_seen:
        return ()  # asking DSPy's settings for what they do not have is slow
    found: tuple[Budget, ...] = dspy.settings.get(_SETTING, ())
    return found


def unlimited_but(dollars: float) -> Amount:
    """Return a limit in dollars alone."""
    return UNLIMITED._replace(dollars=dollars)


class BudgetStop(BaseException):  # no Exception, so that DSPy lets it pass
    """Ends what runs inside a budget's block where DSPy would take an error for a wrong answer.

    Optimizers, evaluations and `dspy.Parallel` catch every Exception and go on. This one passes
    through them, and leaves the block as the BudgetExceededError that it holds.

    Attributes:
        error: Why.
        budget: Whose block it ends.
    """

    def __init__(self, error: BudgetExceededError, budget: Budget) -> None:
        super().__init__(str(error))
        self.error = error
        self.budget = budget


class _InsideDspy(BaseCallback):
    """Notes where an optimizer or evaluation begins and ends, which would swallow an error."""

    def __init__(self) -> None:
        self._tokens: dict[str, Token[tuple[Budget, ...]]] = {}

    def on_compile_start(self, call_id: str, instance: Any, inputs: Any) -> None:  # noqa: ARG002
        self._tokens[call_id] = _direct.set(())

    def on_compile_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:  # noqa: ARG002
        with suppress(ValueError):  # it has ended in another context
            _direct.reset(self._tokens.pop(call_id))

    on_evaluate_start = on_compile_start
    on_evaluate_end = on_compile_end


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _find_stop(error: BaseException | None) -> BudgetStop | None:
    """Return the stop that `error` is, or that a group of errors holds."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_find_stop, error.exceptions)), None)
    return error if isinstance(error, BudgetStop) else None


def _owner(client: Any) -> Any:
    try:
        return client._runtime  # noqa: SLF001  # what copies share
    except AttributeError:
        raise TypeError(
            f"Budget: clients must be ResilientLMs; got a {type(client).__name__}"
        ) from None
