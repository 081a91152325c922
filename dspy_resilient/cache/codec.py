"""Answers as JSON text and back.

What comes back has the same values and reads the same: litellm's and openai's objects become
their own class again where that is loaded, else dicts whose fields are attributes as well; DSPy's
typed responses become what they were. An answer that JSON cannot hold faithfully is refused. This
module reads and writes no file, and runs nothing that it reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import Any

from dspy_resilient.cache.answer import Answer

_DEEPEST = 64
_TAG = "$"

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
        ValueError: If it nests too deeply, or holds a number that JSON has not.
    """
    document = {
        "outputs": _pack(answer.outputs),
        "record": _pack(answer.record),
        "target": answer.target,
        "tokens": answer.tokens,
        "stored": float(stored),
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def decode(text: bytes) -> tuple[Answer, float]:
    """Return the answer in `text` and its wall-clock time.

    Raises:
        Exception: Of any kind, if `text` is not what `encode` wrote.
    """
    document = json.loads(text.decode("utf-8", "surrogatepass"), parse_constant=_refuse_constant)
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


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _pack(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or type(value) in (int, bool, float):
        return value
    if isinstance(value, (list, tuple)):
        items = [_pack(item, depth + 1) for item in value]
        return items if isinstance(value, list) else _tagged("tuple", items)
    if isinstance(value, dict):
        fields = _pack_fields(value, depth)
        if type(value) is not dict:
            return _tagged("attributes", fields)
        return _tagged("dict", fields) if _TAG in fields else fields
    return _pack_object(value, depth)


def _pack_object(value: Any, depth: int) -> dict[str, Any]:
    kind = type(value)
    if kind.__name__ in _TYPED and _typed(kind.__name__) is kind:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return _tagged("typed", _pack_fields(fields, depth), kind.__name__)
    if kind.__module__.startswith(_LIBRARIES) and hasattr(kind, "model_construct"):
        fields = {**vars(value), **(getattr(value, "__pydantic_extra__", None) or {})}
        fields = {name: item for name, item in fields.items() if not name.startswith("_")}
        return _tagged("object", _pack_fields(fields, depth), f"{kind.__module__}:{kind.__name__}")
    raise TypeError(f"a {kind.__name__} cannot be kept as JSON")


def _pack_fields(fields: dict[Any, Any], depth: int) -> dict[str, Any]:
    if not all(type(name) is str for name in fields):
        raise TypeError("a dict with other keys than str cannot be kept as JSON")
    return {name: _pack(item, depth + 1) for name, item in fields.items()}


def _tagged(form: str, content: Any, name: str = "") -> dict[str, Any]:
    return {_TAG: form, "of": content, **({"class": name} if name else {})}


def _unpack(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, list):
        return [_unpack(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if _TAG in value:
            return _FORMS[value[_TAG]](_unpack_all(value["of"], depth), value.get("class"))
        return _unpack_all(value, depth)
    return value


def _unpack_all(content: Any, depth: int) -> Any:
    if isinstance(content, list):
        return [_unpack(item, depth + 1) for item in content]
    return {name: _unpack(item, depth + 1) for name, item in content.items()}


def _typed(name: str) -> Any:
    from dspy import lm15  # noqa: PLC0415  # only typed answers need it

    return getattr(lm15, name, None)


def _rebuilt_typed(fields: dict[str, Any], name: str) -> Any:
    if name not in _TYPED:
        raise ValueError(f"no such type: {name!r}")
    return _typed(name)(**fields)


def _rebuilt_object(fields: dict[str, Any], place: str) -> Any:
    """Return an object of the class at `place` if that is loaded, without running its checks."""
    module, _, name = place.partition(":")
    cls = getattr(sys.modules.get(module), name, None) if module.startswith(_LIBRARIES) else None
    if not (isinstance(cls, type) and hasattr(cls, "model_construct")):
        return Attributes(fields)
    rebuilt = cls.model_construct(**fields)
    for unset in vars(rebuilt).keys() - fields.keys():  # what the class would fill in by itself
        del vars(rebuilt)[unset]
    return rebuilt


_FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda items, _: tuple(items),
    "dict": lambda fields, _: dict(fields),
    "attributes": lambda fields, _: Attributes(fields),
    "typed": _rebuilt_typed,
    "object": _rebuilt_object,
}
