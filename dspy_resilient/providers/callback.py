"""The one callback object of ours that LiteLLM calls, and its place in LiteLLM's lists.

This module imports LiteLLM, late, and keeps the callback registered whatever others do to the
lists. What the events mean is for the observer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from dspy_resilient.providers.litellm_module import load_litellm

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
_CACHES = "cache"  # LiteLLM adds it when its proxy's parts are imported, as they are on a failure
_CALLBACKS_OF_A_CALL = ("callbacks", "success_callback")

Receive = Callable[..., None]


class Hook:
    """LiteLLM's end of the line; safe for threads, takes its lock only when something is missing.

    Args:
        receive: Called with the event's keywords, answer, start and end, and whether it `succeeded`.
        spares: Whether the call with this id needs no report of its success.
    """

    def __init__(self, receive: Receive, spares: Callable[[object], bool]) -> None:
        self._receive = receive
        self._spares = spares
        self._litellm: Any = None
        self._logger: Any = None
        self._chose_tokenizer = False
        self._changing = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether `load` has been done."""
        return self._logger is not None

    def load(self) -> None:
        """Import LiteLLM, which takes seconds the first time; idempotent."""
        litellm = load_litellm()
        from litellm.integrations.custom_logger import CustomLogger  # noqa: PLC0415  # LiteLLM comes late

        with self._changing:
            if self._logger is None:
                self._litellm = litellm
                self._logger = _make_logger(CustomLogger, self._receive, self._spares)

    def is_heard(self, keywords: Mapping[str, Any]) -> bool:
        """Whether others than we have a use for LiteLLM's account of a success; needs `load`."""
        litellm, ours = self._litellm, self._logger
        return bool(
            litellm.max_budget
            or any(keywords.get(name) for name in _CALLBACKS_OF_A_CALL)
            or any(
                each is not ours and (each != _CACHES or litellm.cache is not None)
                for name in _OF_SUCCESSES
                for each in getattr(litellm, name)
            )
        )

    def register(self) -> None:
        """Put the callback into each list that lacks it; needs `load`.

        Also, have LiteLLM count tokens without fetching a tokenizer from a model hub, unless the
        user has chosen: behind a firewall the first stream of a Llama model would stall its event
        loop for half a minute.
        """
        if self._litellm.disable_hf_tokenizer_download is None:
            self._litellm.disable_hf_tokenizer_download = self._chose_tokenizer = True
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
        """Take the callback out of all lists, and leave LiteLLM as it was found."""
        if self._logger is None:
            return
        if self._chose_tokenizer and self._litellm.disable_hf_tokenizer_download is True:
            self._litellm.disable_hf_tokenizer_download, self._chose_tokenizer = None, False
        with self._changing:
            for name in _LISTS:
                callbacks = getattr(self._litellm, name)
                if isinstance(callbacks, list):
                    others = [each for each in callbacks if each is not self._logger]
                    setattr(self._litellm, name, others)

    def renew(self) -> None:
        """Replace the lock, which another thread may have held at a fork."""
        self._changing = threading.Lock()


@contextmanager
def successes_unreported() -> Iterator[None]:
    """Spare the sync requests of this block the account that LiteLLM makes for success callbacks.

    It takes a fifth of the processor time of a call, on another thread. LiteLLM itself spares it
    calls within a call by this mark, which holds for one context and no further. Failures are
    reported as ever, and so are streams. Without the mark in LiteLLM nothing is spared.
    """
    try:
        from litellm._internal_context import is_internal_call  # noqa: PLC0415  # LiteLLM comes late
    except ImportError:
        yield
        return
    token = is_internal_call.set(True)
    try:
        yield
    finally:
        with suppress(ValueError):  # the collector ends it in another context
            is_internal_call.reset(token)


def _make_logger(base: Any, receive: Receive, spares: Callable[[object], bool]) -> Any:
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

        async def async_pre_call_deployment_hook(
            self,
            kwargs: dict[str, Any],
            call_type: Any,  # noqa: ARG002  # LiteLLM passes it
        ) -> dict[str, Any] | None:
            """Have LiteLLM put off, for good, the account of a success that nobody hears.

            The async half of `successes_unreported`, through a mark in LiteLLM's own note of the
            call. (By that other mark it would keep failures of async calls to itself as well.)
            """
            account = kwargs.get("litellm_logging_obj")
            if (
                account is not None
                and not kwargs.get("stream")
                and spares(kwargs.get("litellm_call_id"))
            ):
                account.defer_async_logging = True
            return None

    return Logger()
