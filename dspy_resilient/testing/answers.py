"""An answer function for DSPy programs: it fills in the output fields that a prompt asks for.

It reads prompts as DSPy's Chat, JSON and XML adapters write them and answers in the same format.
It knows formats and types, and nothing about the world but the table it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from dspy_resilient.testing.reply import conversation

Entry = str | Mapping[str, Any]
Table = Mapping[str, Entry] | Callable[[str], Entry | None]

_Format = Literal["chat", "json", "xml"]

# How each adapter ends the last message, and how it names the fields there.
_REQUESTS: tuple[tuple[_Format, str, str], ...] = (
    ("chat", "Respond with the corresponding output fields, starting", r"`\[\[ ## (\w+) ## \]\]`"),
    ("json", "Respond with a JSON object in the following order of fields:", r"`(\w+)`"),
    ("xml", "Respond with the corresponding output fields wrapped in XML tags", r"`<(\w+)>`"),
)

_NOTE = "# note: the value you produce "
_JSON_STRUCTURE = "Outputs will be a JSON object with the following fields."
_DEEP = 6
"""Nesting from which the shortest value is taken, so that recursive schemas end."""

_SCALARS: Mapping[str, Any] = {"integer": 1, "number": 1.0, "boolean": True, "null": None}

_BY_TYPE: tuple[tuple[str, Any], ...] = (
    ("bool", True),
    ("int", 1),
    ("float", 1.0),
    ("list[", []),
    ("dict[", {}),
)


def dspy_answers(table: Table | None = None) -> Callable[[dict[str, Any]], str]:
    """Return an answer function under which DSPy programs run to their end, always the same way.

    Args:
        table: What to answer, by the value of an input field: the first input that the table
            knows decides. A function gets the first input's value and returns None for what it
            does not know. A text fills the first output field that is not `reasoning`; a mapping
            fills the fields it names. Every other field gets a value of its type, worked out from
            the format instructions. Whatever is not a DSPy prompt is looked up as a whole, and
            echoed if unknown.

    An agent (`next_tool_name`) finishes at once, unless the table names its tool: then it calls
    that tool once and finishes afterwards.

    Example:
        >>> answer = dspy_answers({"Capital of France?": "Paris"})
    """
    known = {} if table is None else table

    def answer(body: dict[str, Any]) -> str:
        turns = conversation(body)
        last = next((text for role, text in reversed(turns) if role == "user"), "")
        task = _Task.read(last, "\n".join(text for _, text in turns))
        if task is None:
            entry = _look_up(known, [last])
            return last if entry is None else entry if isinstance(entry, str) else json.dumps(entry)
        return task.answer(_look_up(known, list(task.inputs.values())))

    return answer


def _look_up(table: Table, inputs: list[str]) -> Entry | None:
    if callable(table):
        return table(inputs[0] if inputs else "")
    return next((table[value] for value in inputs if value in table), None)


@dataclass(frozen=True)
class _Task:
    """What one prompt asks for."""

    format: _Format
    given: str
    outputs: list[str]
    request: str
    everything: str

    @classmethod
    def read(cls, last: str, everything: str) -> _Task | None:
        """Return the task of a prompt, or None if no adapter wrote it."""
        for format_, marker, name in _REQUESTS:
            given, found, request = last.rpartition(marker)
            if found:
                outputs = [field for field in re.findall(name, request) if field != "completed"]
                return cls(format_, given, outputs, request, everything)
        return None

    @property
    def inputs(self) -> dict[str, str]:
        """The input fields' values, in order."""
        if self.format == "xml":
            found = re.findall(r"<(\w+)>\n(.*?)\n</\1>", self.given, re.DOTALL)
        else:
            parts = re.split(r"\[\[ ## (\w+) ## \]\]\n", self.given)
            found = list(zip(parts[1::2], parts[2::2], strict=True))
        return {name: value.strip() for name, value in found if name not in self.outputs}

    def answer(self, entry: Entry | None) -> str:
        """Return every output field in the prompt's format."""
        values = {name: self._value(name) for name in self.outputs}
        is_step = "next_tool_name" in values
        if isinstance(entry, Mapping):
            if not (is_step and "observation_0" in self.given):
                values |= {name: entry[name] for name in self.outputs if name in entry}
        elif entry is not None and not is_step:
            main = next((name for name in self.outputs if name != "reasoning"), self.outputs[0])
            values[main] = entry
        return _written(self.format, values)

    def _value(self, name: str) -> Any:
        if name == "next_tool_name":
            return "finish"
        note = self._note(name)
        _, found, rest = note.partition("the JSON schema: ")
        if found:
            return sample(json.loads(rest))
        _, found, choices = note.partition("one of: ")
        if found:
            return choices.split("; ")[0]
        described = re.search(rf"^\d+\. `{name}` \((.*?)\):", self.everything, re.MULTILINE)
        for start, value in _BY_TYPE:
            if described and described[1].startswith(start):
                return value
        shape = re.search(rf"structure:.*?(<{name}>.*?</{name}>)", self.request, re.DOTALL)
        if shape:
            return _from_shape(ET.fromstring(shape[1]))  # noqa: S314  # a prompt of our own process
        about = " ".join(next(iter(self.inputs.values()), "").split())
        return f"{name} for {about[:60]}".strip()

    def _note(self, name: str) -> str:
        """Return what the format instructions say about the field's value."""
        if self.format != "json":
            line = re.search(rf"\{{{name}\}} *{_NOTE}(.*)", self.everything)
            return line[1] if line else ""
        start = self.everything.find("{", self.everything.find(_JSON_STRUCTURE))
        try:
            structure, _ = json.JSONDecoder().raw_decode(self.everything, start)
        except ValueError:
            return ""
        return str(structure.get(name, "")).partition(_NOTE)[2]


def _from_shape(element: ET.Element) -> Any:
    """Return a value of the shape that XMLAdapter sketches; "1" is valid for most types."""
    children = list(element)
    if not children:
        return "1"
    if children[0].tag == "item":
        return [_from_shape(children[0])]
    return {child.tag: _from_shape(child) for child in children}


def _written(format_: _Format, values: Mapping[str, Any]) -> str:
    if format_ == "json":
        return json.dumps(values, ensure_ascii=False)
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
    }
    if format_ == "xml":
        return "\n\n".join(f"<{name}>\n{escape(text)}\n</{name}>" for name, text in texts.items())
    sections = [f"[[ ## {name} ## ]]\n{text}" for name, text in texts.items()]
    return "\n\n".join([*sections, "[[ ## completed ## ]]"])


def sample(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, depth: int = 0) -> Any:
    """Return a small value that fits a JSON schema, the same every time.

    Args:
        schema: The schema; `$ref`, `enum`, `const`, `anyOf`, `allOf` and the basic types count,
            patterns and bounds do not.
        root: Where `$ref` is looked up; the schema itself if None.
        depth: How deep the value lies already; recursive schemas end.
    """
    root = schema if root is None else root
    simpler = _simpler(schema, root, depth)
    if simpler is not None:
        return sample(simpler, root, depth + 1)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "array":
            return [] if depth > _DEEP else [sample(schema.get("items", {}), root, depth + 1)]
        case "object":
            properties = schema.get("properties", {})
            return {name: sample(inner, root, depth + 1) for name, inner in properties.items()}
        case type_:
            return schema.get("const", _SCALARS.get(str(type_), "text"))


def _simpler(
    schema: Mapping[str, Any], root: Mapping[str, Any], depth: int
) -> Mapping[str, Any] | None:
    """Return what a reference or a choice comes down to, or None for any other schema."""
    if "$ref" in schema:
        found: Mapping[str, Any] = root.get("$defs", {}).get(schema["$ref"].rsplit("/", 1)[-1], {})
        return found
    choices = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if not choices:
        return None
    null: Mapping[str, Any] = {"type": "null"}
    if depth > _DEEP and null in choices:
        return null
    return next((choice for choice in choices if choice != null), null)
