"""The one callback object of ours that LiteLLM calls, and its place in LiteLLM's lists.

This module imports LiteLLM, late, and keeps the callback registered whatever others do to the
lists. What the events mean is for the observer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dspy_resilient.providers import loop_end as loops
from dspy_resilient.providers.unheard import report_only_to_listeners

# Where LiteLLM looks: the list that users set, and those it derives from it. It stops deriving at
# a hundred callbacks, so the derived ones need an entry of their own.
_LISTS = (
    "callbacks",
    "input_callback",
    "success_callback",
    "failure_callback",
    "_async_success_callback",
    "_async_failure_callback",
)
_OF_SUCCESSES = ("callbacks", "success_callback", "_async_success_callback")

Receive = Callable[..., None]


class Hook:
    """LiteLLM's end of the line; safe for threads, takes its lock only when something is missing.

    Args:
        receive: Called with the event's keywords, answer, start and end, and whether it `succeeded`.
        wants: Whether `receive` has a use for the success of the call with this id.
    """

    def __init__(self, receive: Receive, wants: Callable[[str], bool]) -> None:
        self._receive = receive
        self._wants = wants
        self._litellm: Any = None
        self._logger: Any = None
        self._changing = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether `load` has been done."""
        return self._logger is not None

    def load(self) -> None:
        """Import LiteLLM, which takes seconds the first time; idempotent."""
        import litellm  # noqa: PLC0415  # late on purpose
        from litellm.integrations.custom_logger import CustomLogger  # noqa: PLC0415  # likewise

        litellm.completion  # noqa: B018  # LiteLLM imports its parts when they are first named
        litellm.disable_hf_tokenizer_download = True  # counting tokens may stall for 46 s
        loops.prepare(litellm)
        with self._changing:
            if self._logger is None:
                self._litellm = litellm
                self._logger = _make_logger(CustomLogger, self._receive)
            with suppress(ImportError, AttributeError):  # another LiteLLM may have no such reports
                report_only_to_listeners(litellm, self._is_heard)

    def _is_heard(self, account: Any) -> bool:
        """Whether anybody has a use for LiteLLM's account of a success."""
        litellm, ours = self._litellm, self._logger
        return bool(
            self._wants(account.litellm_call_id)
            or litellm.max_budget
            or account.dynamic_success_callbacks
            or account.dynamic_async_success_callbacks
            or any(each is not ours for name in _OF_SUCCESSES for each in getattr(litellm, name))
        )

    def register(self) -> None:
        """Put the callback into each list that lacks it; needs `load`."""
        for name in _LISTS:
            callbacks = getattr(self._litellm, name)
            if isinstance(callbacks, list):
                for callback in callbacks:
                    if callback is self._logger:
                        break
                else:
                    self._append(callbacks)

    def _append(self, callbacks: list[Any]) -> None:
        with self._changing:
            if not any(callback is self._logger for callback in callbacks):
                callbacks.append(self._logger)

    def unregister(self) -> None:
        """Take the callback out of all lists."""
        if self._logger is None:
            return
        with self._changing:
            for name in _LISTS:
                callbacks = getattr(self._litellm, name)
                if isinstance(callbacks, list):
                    others = [each for each in callbacks if each is not self._logger]
                    setattr(self._litellm, name, others)

    def renew(self) -> None:
        """Replace the lock, which another thread may have held at a fork."""
        self._changing = threading.Lock()


def _make_logger(base: Any, receive: Receive) -> Any:
    class Logger(base):
        """LiteLLM passes these arguments by name, and drops the event if a name differs."""

        def log_success_event(
            self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            receive(kwargs, response_obj, start_time, end_time, succeeded=True)

        def log_failure_event(
            self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            receive(kwargs, response_obj, start_time, end_time, succeeded=False)

        async def async_log_success_event(
            self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            self.log_success_event(kwargs, response_obj, start_time, end_time)

        async def async_log_failure_event(
            self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            self.log_failure_event(kwargs, response_obj, start_time, end_time)

    return Logger()
