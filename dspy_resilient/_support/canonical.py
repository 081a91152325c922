"""One form for equal values, and a name for secret ones.

`encode` gives the same bytes for equal data in every process, and only for those: 30, 30.0, "30"
and True differ, the order of a dict does not matter. Plain JSON data takes a fast path (in which a
tuple counts as a list and an enum as its value, as they would on the wire); anything else is
spelled out value by value, each with the name of its type. `stand_in` names a secret without
telling it. Cache keys, tenants and the keys of a shared store are made of these two.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import functools
import hashlib
import hmac
import inspect
import json
import math
import os
import types
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

_FAST = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_LABEL = b"dspy_resilient tenant 1"


def encode(value: list[Any]) -> bytes:
    """Return the canonical bytes of `value`.

    Raises:
        TypeError: If there is something in it whose content cannot be told.
    """
    return _plain(value) or b"\0" + _canonical(_spell(value)).encode()  # plain ones start otherwise


def stand_in(secret: str | bytes, label: bytes = _LABEL) -> str:
    """Return what may stand for `secret` where others see it: its HMAC-SHA256 in hex."""
    if isinstance(secret, str):
        secret = secret.encode("utf-8", "surrogatepass")
    return hmac.digest(label, secret, "sha256").hex()


def _plain(asked: list[Any]) -> bytes | None:
    """Encode plain JSON data, or return None if there is anything else in it."""
    try:
        text = orjson.dumps(asked, option=_FAST)
    except TypeError:
        return None
    # Infinity and NaN come out as null.
    return text if b"null" not in text or _is_finite(asked) else None


def _is_finite(asked: list[Any]) -> bool:
    holders: list[Any] = [asked]
    for holder in holders:
        for value in holder.values() if isinstance(holder, dict) else holder:
            kind = type(value)
            if kind is str:
                continue
            if kind is float:
                if not math.isfinite(value):
                    return False
            elif isinstance(value, (dict, list, tuple)):
                holders.append(value)
    return True


def _canonical(spelled: Any) -> str:
    return json.dumps(spelled, separators=(",", ":"))


@functools.singledispatch
def _spell(value: Any) -> Any:
    """Return `value` as scalars and lists, every list beginning with the name of a type.

    Raises:
        TypeError: If there is something in `value` whose content cannot be told.
    """
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return ["dataclass", _name(type(value)), _spell(fields)]
    if hasattr(value, "model_json_schema"):  # a pydantic object
        return ["object", _name(type(value)), _spell(dict(value))]
    raise TypeError(f"a {type(value).__name__} has no canonical form")


@_spell.register(type(None))
@_spell.register(bool)
def _(value: bool | None) -> bool | None:
    return value


@_spell.register(str)
@_spell.register(int)
@_spell.register(float)
def _(value: float | str) -> float | str:
    kind = next(kind for kind in (str, int, float) if isinstance(value, kind))
    return kind(value)


@_spell.register(list)
@_spell.register(tuple)
def _(value: Iterable[Any]) -> list[Any]:
    return ["list", *map(_spell, value)]


@_spell.register(Mapping)
def _(value: Mapping[Any, Any]) -> list[Any]:
    pairs = ([_spell(key), _spell(item)] for key, item in value.items())
    return ["dict", *sorted(pairs, key=lambda pair: _canonical(pair[0]))]


@_spell.register(set)
@_spell.register(frozenset)
def _(value: Iterable[Any]) -> list[Any]:
    return ["set", *sorted(map(_spell, value), key=_canonical)]


@_spell.register
def _(value: enum.Enum) -> Any:
    return _spell(value.value)


@_spell.register(bytes)
@_spell.register(bytearray)
def _(value: bytes | bytearray) -> list[Any]:
    return ["bytes", hashlib.sha256(value).hexdigest()]


@_spell.register(dt.date)
@_spell.register(dt.time)
@_spell.register(dt.timedelta)
@_spell.register(decimal.Decimal)
@_spell.register(uuid.UUID)
def _(value: object) -> list[Any]:
    return [_name(type(value)), str(value)]


@_spell.register
def _(value: os.PathLike) -> list[Any]:  # type: ignore[type-arg]  # the dispatcher wants the bare class
    return ["file", hashlib.sha256(Path(value).read_bytes()).hexdigest()]


@_spell.register
def _(value: type) -> list[Any]:
    schema = getattr(value, "model_json_schema", None)
    if schema is not None:
        return ["schema", value.__name__, _spell(schema())]
    if value.__module__ == "builtins":
        return ["type", value.__name__]
    raise TypeError(f"class {value.__name__} has no canonical form")


@_spell.register
def _(value: types.FunctionType) -> list[Any]:
    """Tell a function by its source, its defaults and what it closes over."""
    if value.__name__ == "<lambda>":  # its source is its whole line, which another may share
        raise TypeError("a lambda has no source of its own")
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    extras = [value.__defaults__, value.__kwdefaults__, cells]
    return ["function", _name(value), inspect.getsource(value), _spell(extras)]


@_spell.register
def _(value: types.BuiltinFunctionType) -> list[Any]:
    if not isinstance(value.__self__, types.ModuleType):
        raise TypeError(f"{value.__qualname__} belongs to an object")
    return ["builtin", _name(value)]


@_spell.register
def _(value: types.MethodType) -> list[Any]:
    return ["method", _spell(value.__func__), _spell(value.__self__)]


@_spell.register
def _(value: functools.partial) -> list[Any]:  # type: ignore[type-arg]  # the dispatcher wants the bare class
    return ["partial", _spell(value.func), _spell(value.args), _spell(value.keywords)]


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
