"""Spares sync calls an event loop of their own, which LiteLLM starts to tell nobody anything.

After each sync request LiteLLM runs a coroutine that reports to its `service_callback`s, if there
are any: on a new event loop in a thread, and in the main thread on one that it leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def report_only_to_listeners(litellm: Any) -> None:
    """Have LiteLLM start that loop only if there is a `service_callback`; once is enough."""
    from litellm._service_logger import ServiceLogging  # noqa: PLC0415  # LiteLLM comes late

    report = ServiceLogging._dispatch_from_sync  # noqa: SLF001  # there is no other switch
    if getattr(report, "__module__", None) == __name__:
        return

    def report_to_listeners(hook: Callable[[], Any]) -> None:
        if litellm.service_callback:
            report(hook)

    ServiceLogging._dispatch_from_sync = staticmethod(report_to_listeners)  # noqa: SLF001
