"""What calls may spend: books, estimates, and the `with` block of a user."""

from dspy_resilient.budgets.budget import Budget, BudgetStop, in_force, unlimited_but
from dspy_resilient.budgets.ledger import Amount, Hold, Ledger
from dspy_resilient.budgets.meter import Meter

__all__ = ["Amount", "Budget", "BudgetStop", "Hold", "Ledger", "Meter", "in_force", "unlimited_but"]
