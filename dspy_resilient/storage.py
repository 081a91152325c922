"""Where answers are beyond memory: on disk, and with other processes that share theirs.

Both take time, so looking there is a matter of steps. What is worth keeping, and for how long, is
for the cache to say.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dspy_resilient.steps import Disk, Wait

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dspy_resilient.cache import Answer
    from dspy_resilient.cache.others import Others
    from dspy_resilient.runtime import Runtime
    from dspy_resilient.steps import Steps


def load(client: Runtime, key: str) -> Steps[Answer | None]:
    """Return the answer that is not in memory but on disk, or with others who share, or None."""
    cache = client.cache
    answer: Answer | None = None
    if cache.has_disk:
        answer = yield Disk(client.clerk, partial(cache.load, key))
    if answer is None and cache.others is not None:
        seen = cache.evictions
        found = yield from _hear(cache.others, cache.others.find(key))
        answer = cache.receive(found, seen)
    return answer


def save(client: Runtime, answer: Answer) -> Steps[None]:
    """Write a new answer to disk, and let others have it, where there is either."""
    cache = client.cache
    if cache.has_disk:
        yield Disk(client.clerk, partial(cache.save, answer))
    if cache.others is not None:
        yield from _hear(cache.others, cache.others.keep(answer))


def _hear(others: Others, news: Future[Answer | None] | None) -> Steps[Answer | None]:
    """Wait for what the shared store has to say, for as long as anybody waits for it."""
    if news is None:
        return None
    answer: Answer | None = yield Wait(news, others.patience_left())
    if not news.done():
        others.go_alone()
    return answer
