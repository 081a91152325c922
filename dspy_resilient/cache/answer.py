"""An answer as the cache keeps it: what the call returned, and DSPy's history entry of it.

This module owns what a stored answer looks like, what of it may be handed out, and which answers
are fit to be stored. It keeps no prompt, and it does not store anything itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

# What belongs to one call and not to its answer; usage is empty whenever an answer is replayed.
_OF_THE_CALL = frozenset(
    {"prompt", "messages", "kwargs", "request", "timestamp", "uuid", "attempts"}
    | {"usage", "cache_hit", "stale"}
)


@dataclass(slots=True)
class Answer:
    """What a provider answered; safe to share between threads, as nobody changes it.

    Attributes:
        outputs: What the public call returns: a list of str or dict, or a `dspy.lm15.Response`.
        record: DSPy's history entry, less what belongs to one call; None where there was none.
        target: Label of the target that answered.
        stored_at: When it was stored, on the client's clock, in seconds.
        tokens: Tokens the provider counted for it: what a hit saves. 0 if unknown.
        key: Key it is stored under, for whoever has to evict it. "" if it is not stored.
        size: Bytes it takes in memory, by estimate; 0 where nobody asked.
        is_evicted: Whether somebody has evicted it since it was stored.
        is_marked: Whether the response in the record bears the mark of a hit.
    """

    outputs: Any
    record: dict[str, Any] | None
    target: str = ""
    stored_at: float = 0.0
    tokens: int = 0
    key: str = ""
    size: int = 0
    is_evicted: bool = False
    is_marked: bool = False

    @classmethod
    def of(
        cls,
        outputs: Any,
        entry: dict[str, Any] | None,
        *,
        target: str = "",
        stored_at: float = 0.0,
    ) -> Self:
        """Keep what a call returned, and what of its history entry is worth keeping.

        Neither argument is changed, and what the caller later does to `outputs` changes nothing
        here. The provider's own response is kept as it is: nobody writes to it, by contract.
        """
        record = None
        usage = _field(outputs, "usage")
        if entry is not None:
            usage = entry.get("usage")
            record = {name: value for name, value in entry.items() if name not in _OF_THE_CALL}
            if record.get("outputs") is outputs:
                del record["outputs"]
            elif "outputs" in record:  # a typed call: history has its own shape of them
                record["outputs"] = _fresh(record["outputs"])
        return cls(_fresh(outputs), record, target, stored_at, _tokens(usage))

    @property
    def cost(self) -> float | None:
        """What it cost in dollars, as far as its price is known."""
        cost = None if self.record is None else self.record.get("cost")
        return cost if isinstance(cost, (int, float)) else None

    def fresh_outputs(self) -> Any:
        """Return the outputs in a form that the caller may change.

        Lists and dicts are copied all the way down; a typed response is frozen and is itself.
        """
        return _fresh(self.outputs)

    def replayed_record(self) -> dict[str, Any] | None:
        """Return the part of a hit's history entry that the answer decides, or None without one.

        As DSPy writes it: no usage, the old cost, and the response marked as a cache hit
        where its type takes a mark. The caller adds prompt, messages, kwargs, time and uuid.
        """
        record = self.record
        if record is None:
            return None
        if not self.is_marked:  # once is enough: nobody writes to a response
            record["response"] = _marked(record.get("response"))
            self.is_marked = True
        return {
            **record,
            "outputs": _fresh(record.get("outputs", self.outputs)),
            "usage": {},
            "cache_hit": True,
        }


def usable(answer: Answer) -> str | None:
    """Return None if `answer` may be stored, else why not, in a word.

    "empty", "truncated", "filtered", "partial" or "error". Of several candidates each must be
    fit. An answer without a history entry is judged by its outputs alone.
    """
    outputs = answer.outputs
    response = outputs if answer.record is None else answer.record.get("response")
    reason = flaw_of(response)
    if reason is not None:
        return reason
    texts = outputs if isinstance(outputs, list) else [outputs]
    return None if texts and all(_says_something(text) for text in texts) else "empty"


def flaw_of(response: Any) -> str | None:
    """Return what a provider's response, or one of several, admits to be wrong with it.

    In the words of `usable`, but "empty"; None if it admits nothing.
    """
    return next((_FLAWS[sign] for sign in _all_signs(response) if sign in _FLAWS), None)


def ended(response: Any) -> bool:
    """Whether the provider says in a response, or in one of several, how it ended."""
    return any(_all_signs(response))


def broken_off(response: Any) -> str | None:
    """Return the provider's own word for why it did not finish `response`, or None if it did.

    What the model itself made a mess of was finished.
    """
    return next((sign for sign in _all_signs(response) if sign in _SERVERS_TROUBLE), None)


# What a provider says, in lower case, whose own trouble it was that an answer ended.
_SERVERS_TROUBLE = frozenset(
    {"abort", "engine_overloaded", "error", "failed", "insufficient_system_resource"}
    | {"network_error", "not done", "timeout"}
)
_FLAWS = {
    **dict.fromkeys(_SERVERS_TROUBLE, "error"),
    "length": "truncated",
    "max_tokens": "truncated",
    "max_output_tokens": "truncated",
    "repetition_truncation": "truncated",
    "content_filter": "filtered",
    "guardrail_intervened": "filtered",
    "refusal": "filtered",
    "safety": "filtered",
    "cancelled": "error",
    "malformed_function_call": "error",
    "malformed_response": "error",
    "missing_thought_signature": "error",
    "too_many_tool_calls": "error",
    "unexpected_tool_call": "error",
    "in_progress": "partial",
    "queued": "partial",
    "incomplete": "partial",
}


def _all_signs(response: Any) -> Iterator[str]:
    """Yield the signs of a response, or of several, in lower case."""
    for each in response if isinstance(response, (list, tuple)) else (response,):
        yield from map(str.lower, _signs(each))


def _signs(response: Any) -> Iterator[str]:
    """Yield the words in which a provider says how its answer ended.

    The provider's own come first: LiteLLM and DSPy's engines have one word, "stop", for many.
    """
    for each in (_field(response, "provider_data"), response):
        if each is not None:
            signs = _choice_signs(each) or _single_signs(each)
            yield from (sign for sign in signs if isinstance(sign, str))


def _choice_signs(response: Any) -> list[Any]:
    """Return the signs of a chat or text completion."""
    signs: list[Any] = []
    for choice in (*_items(response, "choices"), *_items(response, "candidates")):
        own = _field(choice, "provider_specific_fields")
        signs.append(_field(own, "native_finish_reason"))
        if _field(own, "error") or _field(choice, "error"):
            signs.append("error")
        signs += [_field(choice, "finishReason"), _field(choice, "finish_reason")]
        if _field(_field(choice, "message"), "refusal"):
            signs.append("refusal")
    return signs


def _single_signs(response: Any) -> list[Any]:
    """Return the signs of a Responses API object, or of a typed response."""
    signs = [_field(response, "finish_reason"), "error" if _field(response, "error") else None]
    status = _field(response, "status")
    if status == "incomplete":
        signs.append(_field(_field(response, "incomplete_details"), "reason"))
    signs.append(status)
    done = _field(response, "done")  # Ollama's
    if isinstance(done, bool):
        signs.append("done" if done else "not done")
    signs.append(_field(_field(response, "delta"), "stop_reason"))  # Anthropic's, of a stream
    for item in (*_items(response, "output"), *_parts(response)):
        kinds = [_field(item, "type"), *(_field(part, "type") for part in _items(item, "content"))]
        signs.append("refusal" if "refusal" in kinds else None)
    return signs


def _items(owner: Any, name: str) -> list[Any] | tuple[Any, ...]:
    value = _field(owner, name)
    return value if isinstance(value, (list, tuple)) else ()


def _parts(response: Any) -> list[Any] | tuple[Any, ...]:
    return _items(_field(response, "message"), "parts")


_NOT_SAID = frozenset({"reasoning_content", "logprobs", "citations"})


def _says_something(output: Any) -> bool:
    if isinstance(output, str):
        return bool(output.strip())
    if isinstance(output, dict):
        said = (value for name, value in output.items() if name not in _NOT_SAID)
        return any(value.strip() if isinstance(value, str) else value for value in said)
    parts = (part for part in _parts(output) if _field(part, "type") != "thinking")
    return any(_says_part(part) for part in parts)


def _says_part(part: Any) -> bool:
    text = _field(part, "text")
    return bool(text.strip()) if isinstance(text, str) else True


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)


def _tokens(usage: Any) -> int:
    total = _field(usage, "total_tokens")
    if total is None:
        names = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
        parts = (_field(usage, name) for name in names)
        total = sum(part for part in parts if isinstance(part, int))
    return total if isinstance(total, int) else 0


def _is_frozen(value: Any) -> bool:
    """Whether `value` is a typed response: a frozen dataclass, which nobody can change."""
    return _are_frozen(type(value))  # type: ignore[arg-type]  # a class can be hashed


@functools.lru_cache(maxsize=256)
def _are_frozen(kind: type) -> bool:
    settings = getattr(kind, "__dataclass_params__", None)  # slow to miss on a Pydantic class
    return settings is not None and bool(settings.frozen)


def _fresh(outputs: Any) -> Any:
    if type(outputs) is list:
        return [each if isinstance(each, str) else _copied(each) for each in outputs]
    return _copied(outputs)


def _copied(value: Any) -> Any:
    if value is None or _is_frozen(value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001  # a value that cannot be copied must not fail the call
        return value


def _marked(response: Any) -> Any:
    if response is None or isinstance(response, (tuple, list, str)) or _is_frozen(response):
        return response
    try:
        marked = copy.copy(response)
        if isinstance(marked, dict):
            marked.update(usage={}, cache_hit=True)
        else:
            marked.usage = {}
            # Strict response classes refuse unknown attributes in their own __setattr__.
            object.__setattr__(marked, "cache_hit", True)
    except Exception:  # noqa: BLE001  # a response that takes no mark is replayed without
        return response
    return marked
