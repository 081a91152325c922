"""Spares our calls the reports that LiteLLM makes although nobody hears them.

After each request LiteLLM describes it at length for its success callbacks, on another thread or
in a task: a fifth of the processor time of a sync call, a tenth of an async one's. After a sync one
it also runs a coroutine for its `service_callback`s, on a new event loop in a thread, and in the
main thread on one that it leaves open. Where there is such a callback, nothing changes; nor does it
for calls that are not ours, and for streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def report_only_to_listeners(litellm: Any, is_heard: Callable[[Any], bool]) -> None:
    """Have LiteLLM report to listeners only; once is enough, whatever `is_heard` then is.

    Args:
        litellm: The package.
        is_heard: Whether anybody wants to know that a request has succeeded, of which it gets
            LiteLLM's account.
    """
    _services(litellm)
    _successes(is_heard)


def _services(litellm: Any) -> None:
    from litellm._service_logger import ServiceLogging  # noqa: PLC0415  # LiteLLM comes late

    report = ServiceLogging._dispatch_from_sync  # noqa: SLF001  # there is no other switch
    if getattr(report, "__module__", None) == __name__:
        return

    def report_to_listeners(hook: Callable[[], Any]) -> None:
        if litellm.service_callback:
            report(hook)

    ServiceLogging._dispatch_from_sync = staticmethod(report_to_listeners)  # noqa: SLF001


def _successes(is_heard: Callable[[Any], bool]) -> None:
    from litellm.litellm_core_utils.litellm_logging import Logging  # noqa: PLC0415  # likewise

    report, report_async = Logging.success_handler, Logging.async_success_handler
    if hasattr(report, "__wrapped__"):
        return

    @functools.wraps(report)
    def success_handler(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.stream or is_heard(self):
            report(self, *args, **kwargs)

    @functools.wraps(report_async)
    async def async_success_handler(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.stream or is_heard(self):
            await report_async(self, *args, **kwargs)

    Logging.success_handler = success_handler
    Logging.async_success_handler = async_success_handler
