"""Renews, in a forked child, what must not be inherited.

A lock that another thread held at the moment of the fork stays locked in the child for ever, and
whatever that thread had under way does not exist there. This module keeps the (weak) list of what
has to be renewed; it does not know how.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Renewable(Protocol):
    """Something that can forget what only the parent process had."""

    def renew(self) -> None:
        """Replace locks and whatever they guard; called in the child, before any other thread."""
        ...


_living: WeakSet[Renewable] = WeakSet()


def renew_after_fork(thing: Renewable) -> None:
    """Have `thing.renew()` called in every child forked while `thing` lives; it is held weakly."""
    _living.add(thing)


def _renew_all() -> None:
    for thing in list(_living):
        thing.renew()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_all)
