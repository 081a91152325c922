"""The answers that the clients of one name have in common, behind the memory and disk of each.

Orders are collected and carried several at a time. A look-up waits for the store, a quarter of a
second at most; nothing else does: a finished answer is stored in the background (and at the
interpreter's exit, for as long). When the store does not answer, every look-up is a miss at once.

What is stored is the text that the disk would keep, behind a digest that ties it to its key: what
was garbled, or moved to another key, is a miss. Where the environment has a DSPY_RESILIENT_SECRET
the digest is an HMAC under it, and what any other writer has put there is a miss too.
"""

from __future__ import annotations

import atexit
import base64
import dataclasses
import hmac
import os
import threading
import zlib
from collections import deque
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakSet

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.cache.codec import decode, encode
from dspy_resilient.shared.link import PATIENCE, Link
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
_DIGEST = 32
_NO_SECRET = b"dspy_resilient shared answer 1"

SECRET_VARIABLE = "DSPY_RESILIENT_SECRET"  # noqa: S105  # the name, not the secret
_FORGET = ("forget", "forget_all")


_living: WeakSet[SharedAnswers] = WeakSet()


@atexit.register
def _flush() -> None:
    """Wait until what was stored has arrived, all clients together no longer than a look-up."""
    untold = [found for each in list(_living) for found in each.untold()]
    if untold:
        wait(untold, PATIENCE)


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
        _living.add(self)

    def renew(self) -> None:
        """Begin anew in a forked child: what is under way, the parent gets."""
        self._lock = threading.RLock()
        self._begin(self._courier)
        self._outbox: deque[_Errand] = deque()
        self._results: deque[tuple[Found, Answer | None]] = deque()

    def load(self, key: str) -> Found | None:
        """Return the future of the answer stored under `key`; None if there is no asking now."""
        return self._send(CacheOrder("load", key, kept=self._kept))

    def store(self, answer: Answer) -> Found | None:
        """Store an answer in the background; return a future for its being there, or None."""
        return self._send(CacheOrder("store", answer.key, kept=self._kept), answer)

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

    def untold(self) -> list[Found]:
        """Return the futures of what the store has not heard."""
        with self._lock:
            return [each.found for each in (*(self._under_way or ()), *self._outbox)]

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
        return Verb("cache", (self._key, [self._worded(each) for each in request]))

    def _worded(self, errand: _Errand) -> CacheOrder:
        """Return the order with its text; an answer that is not to be stored makes room."""
        order, answer = errand.order, errand.answer
        if answer is None:
            return order
        text = b"" if answer.is_evicted else _packed(answer)
        if not text:
            return CacheOrder("forget", order.name)
        return order._replace(text=self._digest(order.name, text) + text)

    def _digest(self, name: str, text: bytes) -> bytes:
        """Return what ties `text` to the client's key and the answer's name."""
        message = b"%s\n%s\n%s" % (self._key.encode(), name.encode(), text)
        secret = os.environ.get(SECRET_VARIABLE, "").encode() or _NO_SECRET
        return hmac.digest(secret, message, "sha256").hex()[:_DIGEST].encode()

    def _checked(self, name: str, text: bytes) -> bytes:
        """Return `text` without its digest.

        Raises:
            ValueError: It was not stored so.
        """
        digest, text = text[:_DIGEST], text[_DIGEST:]
        if not hmac.compare_digest(digest, self._digest(name, text)):
            raise ValueError("not an answer")
        return text

    def _read(self, request: list[_Errand], reply: list[CachedText | None]) -> list[Answer | None]:
        return [self._answer(each.order, text) for each, text in zip(request, reply, strict=True)]

    def _answer(self, order: CacheOrder, text: CachedText | None) -> Answer | None:
        if text is None:
            return None
        try:
            answer = _unpacked(self._checked(order.name, text.text))
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
    return text if len(text) + _DIGEST <= MOST_TEXT else b""


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
