"""State that several processes have in common, on a store that they already run.

`Store` says what a store can do, in atomic verbs; `RedisStore` does it on Redis or Valkey, and
`MemoryStore` in this process. `SharedState` is a client's share in one. Imported only when something is
shared; the state machines themselves are elsewhere.
"""

from dspy_resilient.shared.memory import MemoryStore
from dspy_resilient.shared.redis import RedisStore
from dspy_resilient.shared.shared_state import SharedState
from dspy_resilient.shared.store import Store

__all__ = ["MemoryStore", "RedisStore", "SharedState", "Store"]
