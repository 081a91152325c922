"""What DSPy must find on the plain twin that sends a request: the mark of an adapter, no callbacks."""

from __future__ import annotations

import contextlib
from typing import Any

try:  # what an adapter of DSPy 3.4 sets to say that a messages= call is its own
    from dspy.clients._deprecation import _adapter_call, adapter_message_call
except ImportError:  # DSPy 3.5 has no such calls any more
    _adapter_call = adapter_message_call = None

IS_TYPED = adapter_message_call is None  # from DSPy 3.5 on, every call is a request
_NOTHING = contextlib.nullcontext()


def called_by_adapter(lm: object, messages: object) -> bool:
    """Whether one of DSPy's adapters has marked this very call as its own."""
    mark = _adapter_call.get() if _adapter_call is not None else None
    return mark is not None and mark[0] is lm and mark[1] is messages


def marked_as_adapters(twin: object, messages: object) -> contextlib.AbstractContextManager[None]:
    """Pass on to the twin the mark that makes a messages= call an adapter's, and so no warning."""
    if adapter_message_call is None or messages is None:
        return _NOTHING
    mark: contextlib.AbstractContextManager[None] = adapter_message_call(twin, messages)
    return mark


class _Told(list[Any]):
    """The callbacks of a twin: none, and with them none of DSPy's settings either.

    DSPy's method adds the two up. The call has told them all by then, and tells them the end.
    """

    def __radd__(self, _: object) -> list[Any]:
        return []


TOLD = _Told()
