"""What an error and its causes say, as plain facts: classes, statuses, codes, headers.

LiteLLM and the SDKs put their errors into each other, and each layer says something else. This
module reads all of them, by name and attribute, so that it needs none of them; it never raises,
and it judges nothing.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import orjson

_MOST = 32
_LONGEST_BODY = 100_000
_MODERATION = {"flagged_input", "reasons"}  # what OpenRouter adds to a 403
_CONNECTION_FAULTS = {"OSError", "TransportError"}  # Python's, and httpx's
_MISHAPS = {"ArithmeticError", "AttributeError", "LookupError", "TypeError", "ValueError"}


class Causes:
    """An error and what caused it.

    Attributes:
        chain: The errors, outermost first.
        names: Names of all their classes, base classes included.
        wire_status: The HTTP status the provider sent, where an HTTP error lies at the bottom.
        status: The same, else the first status that an error claims; LiteLLM invents some.
    """

    __slots__ = ("chain", "names", "status", "wire_status")

    def __init__(self, error: BaseException) -> None:
        self.chain = list(_unfold(error))
        self.names = {base.__name__ for each in self.chain for base in type(each).__mro__}
        self.wire_status = self._sent_status() if "HTTPStatusError" in self.names else None
        self.status = self.wire_status or self._claimed_status()

    def _sent_status(self) -> int | None:
        responses = (_get(each, "response") for each in self.chain if _is_http_error(each))
        statuses = (_as_status(_get(response, "status_code")) for response in responses)
        return next((status for status in statuses if status is not None), None)

    def _claimed_status(self) -> int | None:
        claims = (_get(each, name) for each in self.chain for name in ("status", "status_code"))
        return next((status for claim in claims if (status := _as_status(claim))), None)

    @property
    def sdk_refused(self) -> bool:
        """Whether the OpenAI SDK would not even build its client (no key); LiteLLM says 500."""
        return any(
            type(each).__name__ == "OpenAIError" and type(each).__module__.startswith("openai")
            for each in self.chain
        )

    def codes(self) -> Iterator[str]:
        """Yield the error codes of the provider."""
        for each in self.chain:
            dspys = hasattr(type(each), "default_code")  # DSPy's classes have a `code` of their own
            found = [_get(each, "provider_code" if dspys else "code")]
            for detail in _details(each):
                found += [detail.get(name) for name in ("code", "type", "status")]
                further = detail.get("details")
                if isinstance(further, dict):
                    found.append(further.get("error_code"))
            yield from (code for code in found if isinstance(code, str))

    @property
    def is_flagged(self) -> bool:
        """Whether the provider says that its moderation, and not its door, refused the request."""
        details = (detail for each in self.chain for detail in _details(each))
        found = (detail.get("metadata") for detail in details)
        return any(isinstance(each, dict) and not _MODERATION.isdisjoint(each) for each in found)

    def says(self, sentence: str) -> bool:
        """Whether the provider's message has `sentence`; which may be a prompt's, echoed."""
        details = (detail for each in self.chain for detail in _details(each))
        return any(sentence in str(detail.get("message")).lower() for detail in details)

    @property
    def connection_fault(self) -> str | None:
        """Class of what went wrong with the connection, where that kept a status from being sent."""
        if self.wire_status is not None or self.names.isdisjoint(_CONNECTION_FAULTS):
            return None
        kinds = [type(each) for each in self.chain]
        return next(
            kind.__name__
            for kind in reversed(kinds)
            if any(base.__name__ in _CONNECTION_FAULTS for base in kind.__mro__)
        )

    @property
    def mishap(self) -> bool:
        """Whether what lies at the bottom is an error of Python's own, as of a wrong argument.

        Such a one comes from before the request was sent, or from reading what came back.
        """
        names = {base.__name__ for base in type(self.chain[-1]).__mro__}
        return not _MISHAPS.isdisjoint(names) and "OSError" not in names

    def texts(self) -> Iterator[str]:
        """Yield the messages of the errors, and their bodies where the SDK keeps them."""
        for each in self.chain:
            yield _text(each)
            body = _get(each, "body")
            if isinstance(body, (dict, list)):
                yield str(body)

    def attributes(self, name: str) -> Iterator[Any]:
        """Yield the attribute `name` of every error, None where there is none."""
        return (_get(each, name) for each in self.chain)

    def headers(self) -> Iterator[dict[str, str]]:
        """Yield the response headers each error carries, by lower-case name."""
        for each in self.chain:
            found: dict[str, str] = {}
            for holder in (
                _get(each, "litellm_response_headers"),
                _get(_get(each, "response"), "headers"),
                _get(each, "headers"),
                _get(each, "rate_limit_headers"),  # DSPy's native engines: tuples of values
            ):
                for name, value in _items(holder):
                    found.setdefault(name.lower(), value)
            if found:
                yield found


def _details(error: BaseException) -> Iterator[dict[str, Any]]:
    """Yield what the provider's body says of an error, as the SDK keeps it or as it came."""
    bodies = [_get(error, "body")]
    if _is_http_error(error):
        content = _get(_get(error, "response"), "content")
        if isinstance(content, bytes) and len(content) < _LONGEST_BODY:
            with contextlib.suppress(ValueError):
                bodies.append(orjson.loads(content))
    for body in bodies:
        if isinstance(body, list) and body:
            body = body[0]  # Gemini's, where it streams  # noqa: PLW2901
        if isinstance(body, dict):
            detail = body.get("error", body)
            yield detail if isinstance(detail, dict) else body


def _unfold(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and its causes, without what was being handled when the attempt began.

    Python hangs that on, too: a tool's error, an adapter's, an earlier attempt's. It can be told
    by where it was caught: in a function that is still running.
    """
    running = set()
    frame = inspect.currentframe()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    waiting: list[Any] = [error]
    seen: list[BaseException] = []
    while waiting and len(seen) < _MOST:
        each = waiting.pop(0)
        if not isinstance(each, BaseException) or any(each is other for other in seen):
            continue
        seen.append(each)
        yield each
        context = each.__context__
        caught = context.__traceback__ if context is not None else None
        if caught is not None and caught.tb_frame in running:
            context = None
        waiting += [each.__cause__ or context, _get(each, "original_exception")]


def _is_http_error(error: BaseException) -> bool:
    return any(base.__name__ == "HTTPStatusError" for base in type(error).__mro__)


def _as_status(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599:  # noqa: PLR2004
        return int(value)
    return None


def _items(holder: Any) -> Iterator[tuple[str, str]]:
    try:
        items = list(holder.items())
    except Exception:  # noqa: BLE001  # whatever it is, it holds no headers
        return
    for name, value in items:
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(name, str) and isinstance(first, (str, int, float)):
            yield name, str(first)


def _get(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name, None)
    except Exception:  # noqa: BLE001  # a property of somebody's exception may raise anything
        return None


_NEVER_ARRIVED = {"ConnectError", "ConnectTimeout", "ConnectionRefusedError", "gaierror"}


def may_be_billed(error: BaseException) -> bool:
    """Whether the provider may have worked on the request that ended with `error`.

    It has not if it refused with a status, or if it was never reached.
    """
    causes = Causes(error)
    return causes.wire_status is None and not causes.names & _NEVER_ARRIVED


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # nor may a broken __str__ hide the error
        return ""
