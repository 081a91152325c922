"""What can be seen of a streamed answer on its way to the consumer.

This module tells whether anything has reached the consumer, and whether the end that came is the
provider's. It changes nothing of what goes by, and it retries nothing.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dspy_resilient.pipeline.twin import IS_TYPED

if TYPE_CHECKING:
    from collections.abc import Callable

# The provider's own chunks carry its name for the model; those that LiteLLM makes up do not.
_MARK = "provider_response_model"
# Ends that LiteLLM makes up for a connection that closes early; others it has from the provider.
_MADE_UP = ("stop", "tool_calls")
# Formats in which the end is always a chunk of its own, so that one without the mark is made up.
# Elsewhere LiteLLM also splits the last chunk in two if it has text, and the end loses its mark.
_ENDS_APART = ("anthropic", "azure")
# Providers whose streams LiteLLM, since 1.110, does not end by itself: a cut is an error.
_NOTICED = ("anthropic", "azure", "groq", "mistral", "openai")
_SINCE = (1, 110)


class WatchedStream:
    """A consumer's stream that notices the first chunk going out, and whether the end came.

    LiteLLM takes a connection that closes early for the end of the answer, and makes up the last
    chunk; of a body that holds nothing it makes an answer of that chunk alone. That one is kept
    back, so that somebody else may answer.

    Where DSPy has turned LiteLLM's chunks into its own, nothing tells the two apart: the end of such
    a stream is known only where no end is made up (see `ends_truly`).

    Attributes:
        emitted: Whether a chunk has reached the consumer that says something: one with the role alone
            does not.
        whole: Whether the provider's own end was seen.
    """

    def __init__(
        self,
        stream: Any,
        *,
        ends_truly: bool = False,
        broken_off: Callable[[], object] = lambda: None,
    ) -> None:
        """Watch `stream`.

        Args:
            stream: The consumer's.
            ends_truly: Whether an end in a chunk of DSPy's own class is real.
            broken_off: Tells whether the provider has said that it did not finish.
        """
        self._stream = stream
        self._ends_truly = ends_truly
        self._broken_off = broken_off
        self._kept_back = False
        self._cut = False
        self._marked = False
        self.emitted = False
        self.whole = True

    @property
    def flaw(self) -> str | None:
        """Why the answer must not be taken for one, or None."""
        if self._kept_back and not self.emitted:
            return "the stream ended without a single chunk of the provider's"
        return "the stream was cut before its end" if self._cut else None

    async def send(self, item: Any) -> None:
        """Look at a chunk and pass it on."""
        choices = getattr(item, "choices", None)
        if choices:
            origin = getattr(item, "_hidden_params", None)  # only LiteLLM's chunks have it
            end, marked = choices[0].finish_reason, origin is not None and _MARK in origin
            made_up = end in _MADE_UP and not marked
            is_bare = not self.emitted and not _says_something(choices[0].delta)
            if is_bare and (made_up or (end is not None and self._broken_off())):
                self._kept_back = True
                self.whole = False
                return
            is_real = self._ends_truly if origin is None else marked
            self.whole = is_real and end is not None
            self._cut = made_up and self._marked and _ends_apart(origin)
            self._marked = self._marked or marked
            self.emitted = self.emitted or end is not None or _says_something(choices[0].delta)
        else:
            self.emitted = True
        await self._stream.send(item)

    def __getattr__(self, name: str) -> Any:
        """Be the stream in everything else."""
        return getattr(self._stream, name)


def ends_truly(lm: Any, *, typed: bool) -> bool:
    """Whether an end in a chunk of DSPy's own class is the provider's, and not LiteLLM's.

    DSPy's native engine makes up none. A typed request may go through either, under "auto".
    """
    engine = getattr(lm, "engine", None)
    if engine != "litellm" and not (engine == "auto" and (IS_TYPED or typed)):
        return True
    provider, slash, _ = lm.model.partition("/")
    provider = lm.kwargs.get("custom_llm_provider") or (provider if slash else "")
    return provider in _NOTICED and _litellm() >= _SINCE  # else a cut looks like an answer


@functools.cache
def _litellm() -> tuple[int, ...]:
    return tuple(map(int, version("litellm").split(".")[:2]))


def _says_something(delta: Any) -> bool:
    return bool(delta.content or getattr(delta, "tool_calls", None))


def _ends_apart(origin: dict[str, Any] | None) -> bool:
    if origin is None:
        return False
    provider = origin.get("custom_llm_provider")
    if provider == "openai":  # many servers speak its format, each in its own way
        endpoint = origin.get("api_base")
        return not endpoint or "//api.openai.com" in str(endpoint)
    return provider in _ENDS_APART
