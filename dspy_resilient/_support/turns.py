"""What only one thread may do at a time, without a lock that Ctrl-C could leave locked."""

from __future__ import annotations


class Turn:
    """One thread's time. The next one begins when it is over, and is found through it.

    Whoever makes one says `over = True` at last, in a `finally`, whether it was taken or not.
    """

    over = False


class Turns:
    """Turns that follow each other. Whoever finds one taken goes away, and waits for nothing.

    One step that no signal interrupts (`dict.setdefault`) decides whose turn is next, and no turn has
    to be given back: it is over when its thread says so.
    """

    def __init__(self) -> None:
        self._last = Turn()
        self._last.over = True

    @property
    def is_taken(self) -> bool:
        """Whether some thread has its turn."""
        last: Turn | None = self._last
        while last is not None and last.over:
            last = last.__dict__.get("next")
        return last is not None

    def take(self, turn: Turn) -> bool:
        """Return whether it is `turn` now; False while another is not over."""
        last = self._last
        while last.over:
            last = last.__dict__.setdefault("next", turn)
        self._last = last
        return last is turn
