"""Answers as JSON text and back.

What comes back has the same values and reads the same: litellm's and openai's objects become
their own class again where that is loaded, else dicts whose fields are attributes as well; DSPy's
typed responses become what they were. An answer that JSON cannot hold faithfully is refused. This
module reads and writes no file, and runs nothing that it reads.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import orjson

from dspy_resilient.cache.answer import Answer

_DEEPEST = 64
_TAG = "$"
_SCALARS = frozenset({str, int, bool, type(None)})

_LIBRARIES = ("litellm.", "openai.")
_TYPED = frozenset(
    {"Response", "Message", "Usage", "TokenLogprob", "TopLogprob", "ContinuationState"}
    | {"Adaptation", "TextPart", "ImagePart", "AudioPart", "VideoPart", "DocumentPart"}
    | {"BinaryPart", "ToolCallPart", "ThinkingPart", "RefusalPart", "CitationPart", "DataPart"}
)


class Attributes(dict[str, Any]):
    """An object's fields, readable by key and by attribute, as in DSPy's own restored responses."""

    def __getattr__(self, name: str) -> Any:
        """Return the field of that name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the field of that name."""
        self[name] = value

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """Return plain dicts and lists, as the object itself would."""
        plain: dict[str, Any] = _dumped(self)
        return plain


def _dumped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _dumped(item) for name, item in value.items()}
    return [_dumped(item) for item in value] if isinstance(value, list) else value


def encode(answer: Answer, stored: float) -> bytes:
    """Return `answer` as JSON; `stored` is the wall-clock time it was stored at.

    Raises:
        TypeError: If JSON cannot hold it faithfully.
        ValueError: If it nests too deeply.
    """
    document = {
        "outputs": _pack(answer.outputs),
        "record": _pack(answer.record),
        "target": answer.target,
        "tokens": answer.tokens,
        "stored": float(stored),
    }
    return orjson.dumps(document)


def decode(text: bytes) -> tuple[Answer, float]:
    """Return the answer in `text` and its wall-clock time.

    Raises:
        Exception: Of any kind, if `text` is not what `encode` wrote.
    """
    document = orjson.loads(text)
    outputs, record = _unpack(document["outputs"]), _unpack(document["record"])
    target, tokens, stored = document["target"], document["tokens"], document["stored"]
    sound = (
        (type(outputs) is list or dataclasses.is_dataclass(outputs))
        and (record is None or type(record) is dict)
        and (type(target), type(tokens), type(stored)) == (str, int, float)
        and math.isfinite(stored)
    )
    if not sound:
        raise ValueError("not an answer")
    return Answer(outputs, record, target, tokens=tokens), stored


def _pack(value: Any, depth: int = 0) -> Any:
    kind = type(value)
    if kind in _SCALARS or (kind is float and math.isfinite(value)):
        return value
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        fields = _pack_fields(value, depth)
        if kind is not dict:
            return {_TAG: "attributes", "of": fields}
        return {_TAG: "dict", "of": fields} if _TAG in fields else fields
    if isinstance(value, (list, tuple)):
        items = [_pack(item, depth + 1) for item in value]
        return items if isinstance(value, list) else {_TAG: "tuple", "of": items}
    if isinstance(value, str):
        return str.__str__(value)
    return _pack_object(value, depth)


def _pack_object(value: Any, depth: int) -> dict[str, Any]:
    kind = type(value)
    if kind.__module__.startswith(_LIBRARIES) and hasattr(kind, "__pydantic_fields__"):
        state = value.__getstate__()
        fields = {n: item for n, item in state["__dict__"].items() if not n.startswith("_")}
        extra = state["__pydantic_extra__"]
        return {
            _TAG: "object",
            "class": f"{kind.__module__}:{kind.__name__}",
            "unset": sorted(fields.keys() - state["__pydantic_fields_set__"]),
            "of": [_pack_fields(fields, depth), extra and _pack_fields(extra, depth)],
        }
    if kind.__name__ in _TYPED and _typed(kind.__name__) is kind:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {_TAG: "typed", "class": kind.__name__, "of": _pack_fields(fields, depth)}
    raise TypeError(f"a {kind.__name__} cannot be kept as JSON")


def _pack_fields(fields: dict[Any, Any], depth: int) -> dict[str, Any]:
    if not all(type(name) is str for name in fields):
        raise TypeError("a dict with other keys than str cannot be kept as JSON")
    return {name: _pack(item, depth + 1) for name, item in fields.items()}


def _unpack(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, list):
        return [_unpack(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if _TAG in value:
            return _FORMS[value[_TAG]](_unpack_all(value["of"], depth), value)
        return _unpack_all(value, depth)
    return value


def _unpack_all(content: Any, depth: int) -> Any:
    if isinstance(content, list):
        return [_unpack(item, depth + 1) for item in content]
    return {name: _unpack(item, depth + 1) for name, item in content.items()}


def _typed(name: str) -> Any:
    from dspy import lm15  # noqa: PLC0415  # only typed answers need it

    return getattr(lm15, name, None)


def _rebuilt_typed(fields: dict[str, Any], tagged: dict[str, Any]) -> Any:
    if tagged["class"] not in _TYPED:
        raise ValueError(f"no such type: {tagged['class']!r}")
    return _typed(tagged["class"])(**fields)


def _rebuilt_object(state: list[Any], tagged: dict[str, Any]) -> Any:
    """Return an object of the class named, if that is loaded: filled as unpickling would."""
    fields, extra = state
    module, _, name = tagged["class"].partition(":")
    cls: Any = None
    if module.startswith(_LIBRARIES):
        cls = getattr(sys.modules.get(module), name, None)
    if not hasattr(cls, "__pydantic_fields__"):
        return Attributes({**fields, **(extra or {})})
    rebuilt = cls.__new__(cls)
    rebuilt.__setstate__(
        {
            "__dict__": fields,
            "__pydantic_extra__": extra,
            "__pydantic_fields_set__": {*fields, *(extra or ())}.difference(tagged["unset"]),
            "__pydantic_private__": None,
        }
    )
    rebuilt.model_post_init(None)  # private attributes begin at their defaults
    return rebuilt


_FORMS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "tuple": lambda items, _: tuple(items),
    "dict": lambda fields, _: dict(fields),
    "attributes": lambda fields, _: Attributes(fields),
    "typed": _rebuilt_typed,
    "object": _rebuilt_object,
}
