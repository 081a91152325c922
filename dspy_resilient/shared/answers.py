"""The answers that the clients of one name have in common, behind the memory and disk of each.

Orders are collected and carried several at a time. What is kept is the text that the disk would
keep, and what is recalled is trusted as little: it comes from whoever can write to the store. When
the store does not answer, every look-up is a miss at once.
"""

from __future__ import annotations

import base64
import dataclasses
import threading
import zlib
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.cache.codec import decode, encode
from dspy_resilient.shared.link import Link
from dspy_resilient.shared.store import MOST_TEXT, CacheOrder, Verb

if TYPE_CHECKING:
    from dspy_resilient.cache import Answer
    from dspy_resilient.shared.link import Courier
    from dspy_resilient.shared.store import CachedText

    Found: TypeAlias = Future[Answer | None]

_AT_ONCE = 64
_MOST_TO_FORGET = 1000
_LARGE = 2048  # bytes from which on it pays to compress
_MOST_BODY = 8 * MOST_TEXT
_PACKED = b"z"
_FORGET = ("forget", "forget_all")


class _Errand(NamedTuple):
    """One order, the answer if one is to be kept, and the future of what comes of it."""

    order: CacheOrder
    answer: Answer | None
    found: Found


class SharedAnswers(Link["list[_Errand]", "list[Answer | None]"]):
    """Answers that other processes have stored, and will find.

    Args:
        courier: The way to the store.
        key: Under which they lie.
        kept: Seconds that an answer is of use, or inf.
    """

    def __init__(self, courier: Courier, key: str, kept: float) -> None:
        self._courier = courier
        self._key = key
        self._kept = kept
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew in a forked child: what is under way, the parent gets."""
        self._lock = threading.RLock()
        self._begin(self._courier)
        self._outbox: deque[_Errand] = deque()
        self._results: deque[tuple[Found, Answer | None]] = deque()

    def find(self, key: str) -> Found | None:
        """Return the future of the answer stored under `key`; None if there is no asking now."""
        return self._send(CacheOrder("recall", key, kept=self._kept))

    def keep(self, answer: Answer) -> Found | None:
        """Store an answer; return a future for its being there, or None as `find` does."""
        return self._send(CacheOrder("keep", answer.key, kept=self._kept), answer)

    def forget(self, key: str | None = None) -> None:
        """Have the answer under `key` forgotten, or all; later, if the store does not answer."""
        with self._lock:
            if key is None or len(self._outbox) >= _MOST_TO_FORGET:
                others = (each for each in self._outbox if each.order.doing not in _FORGET)
                self._outbox = deque(others)
                self._put(CacheOrder("forget_all"))
            else:
                self._put(CacheOrder("forget", key))
        if not self.alone:
            self.ask()
        with suppress(RuntimeError):  # no thread can be started: see `ask`
            self._courier.watch(self)

    def wants_news(self) -> bool:
        """Whether the store has not heard everything."""
        return bool(self._outbox)

    def _send(self, order: CacheOrder, answer: Answer | None = None) -> Found | None:
        with self._lock:
            is_alone = self.alone
            if is_alone and not self.is_old:
                return None
            found = self._put(order, answer)
        self.ask()
        return None if is_alone else found  # nobody waits to see whether the store is back

    def _put(self, order: CacheOrder, answer: Answer | None = None) -> Found:
        found: Found = Future()
        found.set_running_or_notify_cancel()
        self._outbox.append(_Errand(order, answer, found))
        return found

    # To the store and back; `_draft`, `_hear` and `_do_without` have the lock

    def _draft(self, now: float) -> list[_Errand]:  # noqa: ARG002  # nothing here has a time
        return [self._outbox.popleft() for _ in range(min(_AT_ONCE, len(self._outbox)))]

    def _say(self, request: list[_Errand]) -> Verb:
        return Verb("cache", (self._key, [_worded(each) for each in request]))

    def _read(self, request: list[_Errand], reply: list[CachedText | None]) -> list[Answer | None]:
        return [self._answer(each.order, text) for each, text in zip(request, reply, strict=True)]

    def _answer(self, order: CacheOrder, text: CachedText | None) -> Answer | None:
        if text is None:
            return None
        try:
            answer = _unpacked(text.text)
        except Exception:  # noqa: BLE001  # whatever is in there is no answer
            self.forget(order.name)
            return None
        answer.key = order.name
        answer.stored_at = self._courier.clock() - text.age
        return answer

    def _hear(
        self,
        now: float,  # noqa: ARG002  # each answer has its own
        request: list[_Errand],
        reply: list[Answer | None],
    ) -> None:
        self._results.extend(zip((each.found for each in request), reply, strict=True))
        if self._outbox:
            self.ask()

    def _do_without(
        self,
        now: float,  # noqa: ARG002  # there is nothing to wait for
        request: list[_Errand] | None,
    ) -> None:
        untold = [*(request or ()), *self._outbox]
        self._results.extend((each.found, None) for each in untold)
        self._outbox = deque(each for each in untold if each.order.doing in _FORGET)

    def _wake(self) -> None:
        while self._results:
            with suppress(IndexError, InvalidStateError):  # another thread was quicker
                found, answer = self._results.popleft()
                found.set_result(answer)


def _worded(errand: _Errand) -> CacheOrder:
    """Return the order with its text; an answer that is not to be kept makes room."""
    order, answer = errand.order, errand.answer
    if answer is None:
        return order
    text = b"" if answer.is_evicted else _packed(answer)
    return order._replace(text=text) if text else CacheOrder("forget", order.name)


def _packed(answer: Answer) -> bytes:
    """Return the text of an answer, or b"" if it has none, or one that is too long.

    What is packed is put in letters: a client of the store may have been set up to read text only.
    """
    try:
        text = encode(answer, 0.0)
    except Exception:  # noqa: BLE001  # a value that JSON cannot hold, of whatever kind
        return b""
    if len(text) > _LARGE:
        text = _PACKED + base64.b64encode(zlib.compress(text, 1))
    return text if len(text) <= MOST_TEXT else b""


def _unpacked(text: bytes) -> Answer:
    """Return the answer in `text`.

    Raises:
        Exception: Of any kind, if that is none.
    """
    if text.startswith(_PACKED):
        unpacking = zlib.decompressobj()
        text = unpacking.decompress(base64.b64decode(text[1:], validate=True), _MOST_BODY)
        if not unpacking.eof:
            raise ValueError("not an answer")
    answer, _ = decode(text)
    outputs: Any = answer.outputs
    if not dataclasses.is_dataclass(outputs) and not (
        outputs and all(_is_output(each) for each in outputs)
    ):
        raise ValueError("not an answer")
    return answer


def _is_output(output: Any) -> bool:
    return isinstance(output, str) or (
        isinstance(output, dict) and isinstance(output.get("text"), (str, type(None)))
    )
