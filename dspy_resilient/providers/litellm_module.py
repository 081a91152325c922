"""The one way to LiteLLM: through DSPy's own lazy loader, so that no thread sees it half made."""

from __future__ import annotations

import sys
from typing import Any

from dspy.clients._litellm import get_litellm


def load_litellm() -> Any:
    """Import LiteLLM, which takes seconds the first time, and return it; on any thread.

    DSPy holds a lock of its own while it imports LiteLLM. Python's alone does not help: of two
    threads that import it, or parts of it, at once, one can get a module that is still being made.
    """
    return get_litellm(feature="ResilientLM")


def litellm_so_far() -> dict[str, Any]:
    """Return what LiteLLM has made so far; never imports, loads or makes anything."""
    litellm = sys.modules.get("litellm")
    return {} if litellm is None else object.__getattribute__(litellm, "__dict__")
