"""What a cache may know of the answers of other processes. It says nothing about where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dspy_resilient.cache.answer import Answer


class Others(Protocol):
    """Answers that other processes have stored, and will find. Nothing here blocks or raises."""

    def find(self, key: str) -> Future[Answer | None] | None:
        """Return the future of the answer stored under `key`, or None if there is no asking now."""
        ...

    def keep(self, answer: Answer) -> Future[Answer | None] | None:
        """Store `answer`; return the future of its being there, or None as `find` does."""
        ...

    def forget(self, key: str | None = None) -> None:
        """Have the answer stored under `key` forgotten, or all."""
        ...

    def patience_left(self) -> float:
        """Seconds to wait yet for the futures, before `go_alone`."""
        ...

    def go_alone(self) -> None:
        """Hear that somebody has waited in vain."""
        ...
