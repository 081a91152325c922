"""What DSPy's history says of a call that was answered from the cache.

The entry of a call that was sent is DSPy's own; this module writes those that DSPy would have
written for a hit. It records nothing itself.
"""

from __future__ import annotations

import dataclasses
import os
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dspy

if TYPE_CHECKING:
    from dspy_resilient.pipeline.state import Call, Served


def entry_of_hit(call: Call, served: Served) -> dict[str, Any] | None:
    """Return the history entry of a hit, or None if the answer came without one."""
    record = served.answer.replayed_record()
    if record is None:
        return None
    prompt = call.args[0] if call.args else None
    messages = call.kwargs.get("messages")
    if isinstance(prompt, dspy.lm15.Request):
        record["request"] = prompt
        prompt, messages = None, _messages_of(prompt)
    entry = {
        "prompt": prompt,
        "messages": messages,
        "kwargs": call.recorded(),
        **record,
        "timestamp": datetime.now().isoformat(),  # noqa: DTZ005, TID251  # read by people, as DSPy writes it
        "uuid": _uuid4(),
        "attempts": [],
    }
    if served.stale:
        entry["stale"] = True
    return entry


def _uuid4() -> str:
    """Return a random UUID (RFC 9562, version 4) in less time than `uuid` takes for its object."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    first, second, third = digits[:8], digits[8:12], digits[13:16]
    return f"{first}-{second}-4{third}-{variant}{digits[17:20]}-{digits[20:]}"


def _messages_of(request: Any) -> list[dict[str, Any]]:
    """Return the messages of a typed request as DSPy shows them: text, or plain parts."""
    said = [] if request.system is None else [("system", request.system)]
    said += [(m.role, m.parts if m.text is None else m.text) for m in request.messages]
    return [{"role": role, "content": _plain(content)} for role, content in said]


def _plain(part: Any) -> Any:
    if isinstance(part, (tuple, list)):
        return [_plain(each) for each in part]
    if not dataclasses.is_dataclass(part):
        return part
    fields = ((f.name, getattr(part, f.name)) for f in dataclasses.fields(part))
    return {name: _plain(value) for name, value in fields if value not in (None, (), False)}
