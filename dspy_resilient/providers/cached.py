"""LiteLLM's own cache of clients, as far as we reach into it: find, forget, whose is it.

LiteLLM keeps one client per configuration and event loop there, and that is the one that requests
go through. This module makes and closes none, and imports LiteLLM never: what LiteLLM has not made
yet is not there.
"""

from __future__ import annotations

import contextlib
import heapq
import sys
from typing import Any

_CACHE = "in_memory_llm_clients_cache"


def made_so_far() -> dict[str, Any]:
    """Return what LiteLLM has made so far; never imports, loads or makes anything."""
    litellm = sys.modules.get("litellm")
    return {} if litellm is None else object.__getattribute__(litellm, "__dict__")


def cache() -> Any:
    """Return LiteLLM's cache of clients, or None if there is none yet."""
    return made_so_far().get(_CACHE)


def entries() -> list[tuple[str, Any]]:
    """Return keys and clients; the key of one that was made on a loop ends in that loop's mark."""
    found = cache()
    return [] if found is None else list(found.cache_dict.items())


def mark_of_running_loop() -> str | None:
    """Return what LiteLLM puts after the keys of the clients that it makes on the running loop."""
    found = cache()
    return None if found is None else str(found.update_cache_key_with_event_loop(""))


def forget(key: str) -> None:
    """Remove an entry, unlike `delete_cache` without a trace."""
    found = cache()
    found.cache_dict.pop(key, None)
    expiry = found.ttl_dict.pop(key, None)
    with contextlib.suppress(ValueError):
        found.expiration_heap.remove((expiry, key))
        heapq.heapify(found.expiration_heap)


def is_lent(client: Any, http: Any) -> bool:
    """Whether a caller made `client`, or what it sends through; that is not ours to close."""
    closer = getattr(cache(), "evicted_client_closer", None)
    is_litellms = getattr(closer, "_is_owned", None)
    if is_litellms is None:  # a LiteLLM that does not keep account
        return is_session(http)
    return not is_litellms(client)


def is_session(http: Any) -> bool:
    """Whether `http` is what the user has told LiteLLM to send everything through."""
    made = made_so_far()
    return http is made.get("aclient_session") or http is made.get("client_session")
