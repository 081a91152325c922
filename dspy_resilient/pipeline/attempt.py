"""One request: it runs DSPy's own call method on a plain twin of the target.

An attempt sees what comes of it, and settles permit, gate and slot exactly once, whoever hears of
the end first: LiteLLM's callback, the caller's own return, or a thread whose caller has given up.
Whether there is another one is decided in `call.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import threading
from typing import TYPE_CHECKING, Any

import dspy

from dspy_resilient import providers
from dspy_resilient.cache import Answer, broken_off, ended, flaw_of
from dspy_resilient.errors import DeadlineExceededError
from dspy_resilient.outcomes import Kind, Outcome, classify
from dspy_resilient.outcomes.causes import may_be_billed
from dspy_resilient.pipeline.in_flight import Sending, sending
from dspy_resilient.pipeline.stream import WatchedStream, ends_truly
from dspy_resilient.pipeline.twin import TOLD, marked_as_adapters
from dspy_resilient.providers.prices import price_of
from dspy_resilient.stats.spending import NOT_BILLED, NOTHING, UNANSWERED, Spending

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dspy_resilient.limits import GatePermit, Slot
    from dspy_resilient.outcomes import Verdict
    from dspy_resilient.pipeline.client import ClientState
    from dspy_resilient.pipeline.spending import Funds
    from dspy_resilient.pipeline.state import Call, Turn
    from dspy_resilient.targets.route import Admission

_ASYNC = {"__call__": "acall", "generate": "agenerate"}
_NOTHING = contextlib.nullcontext()
_MAYBE_BILLED = (Kind.FAILURE, Kind.TIMEOUT, Kind.CANCELLED)


class Attempt:
    """One request to one target.

    Attributes:
        client: The client that makes it.
        turn: How the call looks at its target.
        target: Where it goes.
        route: The way it takes there.
        call: Which call it belongs to.
        settings: The client's settings as they are sent.
        key: Key under which the answer is stored, or None.
        limit: Seconds it may take (what is left until the deadline), or inf.
        emitted: Whether a chunk has reached the consumer of a stream.
        seconds: How long it took, once it has ended.
        paused: Seconds for which its 429 has closed the gate.
    """

    def __init__(
        self,
        client: ClientState,
        turn: Turn,
        call: Call,
        admission: Admission,
        gate_permit: GatePermit,
        slot: Slot | None,
        funds: Funds | None = None,
    ) -> None:
        self.client = client
        self.turn = turn
        self.target = target = turn.target
        self.route = turn.route
        self.call = call
        self.settings, self.key = target.sent(call)
        self.seconds = self.paused = 0.0
        self._admission = admission
        self._gate_permit = gate_permit
        self._slot = slot
        self._funds = funds
        self._clock = client.clock
        self._started = client.begin("attempts")
        self.limit = call.left(self._started)
        self._ending = providers.Ending()
        self._stream: WatchedStream | None = None
        self._record: dict[str, Any] | None = None
        self._spent = NOTHING
        self._mark = Sending()
        self._evidence: providers.CallbackEvent | None = None
        self._http: providers.PooledClient | None = None
        self._is_broken = False
        self._verdict: Verdict | None = None
        self._reported = False
        self._left_behind = self._discard = False
        self._settling = threading.Lock()

    @property
    def label(self) -> str:
        """Return the route's label."""
        return self.route.label

    @property
    def probe(self) -> bool:
        """Whether it is the probe of a half-open circuit."""
        return self._admission.probe

    @property
    def emitted(self) -> bool:
        """Whether a chunk has reached the consumer."""
        return self._stream is not None and self._stream.emitted

    @property
    def record(self) -> dict[str, Any]:
        """Return DSPy's history entry of the answer, empty before there is one."""
        return self._record or {}

    @property
    def flaw(self) -> str | None:
        """Why the answer is not fit to be stored, as far as the way it came tells; see `usable`."""
        stream, said = self._stream, self._ending.said()
        is_cut = stream is not None and not stream.whole and not ended(said)
        return "partial" if is_cut else flaw_of(said)

    def run(self, loop: asyncio.AbstractEventLoop | None = None) -> Answer:
        """Send the request on this thread and return the answer.

        Args:
            loop: Of the consumer, if it is streamed: DSPy then sends it there.
        """
        method, args, kwargs = self._prepare(self.call.method)
        with self._scope(args, kwargs, loop) as twin:
            return self._answer(method(twin, *args, **kwargs))

    async def arun(self) -> Answer:
        """Send the request on the running loop and return the answer.

        A sync call comes here too, where it streams under a deadline: its loop is its consumer's.
        """
        name = self.call.method
        method, args, kwargs = self._prepare(_ASYNC.get(name, name))
        with self._scope(args, kwargs, asyncio.get_running_loop()) as twin:
            return self._answer(await method(twin, *args, **kwargs))

    def _prepare(self, name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return DSPy's method as it is found now: what tracing has wrapped around it runs."""
        return getattr(self.target.kind, name), self.turn.args, dict(self.turn.kwargs)

    @contextlib.contextmanager
    def _scope(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None,
    ) -> Iterator[Any]:
        """Set up what DSPy and LiteLLM are to see during the attempt, and nothing beyond it."""
        lm = self.target.lm
        keywords = {"model": lm.model, **self.settings, **kwargs}
        token = sending.set(self._mark)
        try:
            by_keywords = self._by_keywords(args)
            route = self.route
            watch = providers.watch(
                self._witness,
                by_keywords,
                keywords,
                route.circuit,
                route.service,
                is_sync=loop is None,
            )
            with watch as tags:
                if by_keywords:
                    tags.update(self._connect(keywords, loop))
                twin: Any = self._twin(tags)
                try:
                    marked = marked_as_adapters(twin, kwargs.get("messages"))
                    with self._traced(), self._settings(args), marked, self._ending.heard():
                        yield twin
                finally:
                    del twin.update_history  # it holds the twin and the attempt in a cycle
        finally:
            if self._http is not None:  # what holds the attempt need not hold the connections
                self._is_broken, self._http = self._http.is_broken, None
            with contextlib.suppress(ValueError):  # the collector ends it in another context
                sending.reset(token)

    def _connect(
        self, keywords: Mapping[str, Any], loop: asyncio.AbstractEventLoop | None
    ) -> dict[str, Any]:
        """Return the keywords that name the HTTP client, and what is left of the deadline.

        Where LiteLLM keeps the client no timeout is added: it would open a connection for each.
        """
        if keywords.get("fallbacks"):  # LiteLLM's own, which may lie elsewhere
            return {}
        lm = self.target.lm
        find = self.client.http_clients.find
        self._http = http = find(loop, lm.model, lm.model_type, keywords, lm.kwargs)
        if http is None:
            return {}
        own = keywords.get("timeout")
        timeout = own if math.isinf(self.limit) else providers.within(own, self.limit)
        if timeout is None or timeout is lm.kwargs.get("timeout"):
            return {"client": http.client}
        return {"client": http.under(timeout), "timeout": timeout}

    def _by_keywords(self, args: tuple[Any, ...]) -> bool:
        """Whether LiteLLM sees the keywords of this attempt: not through another engine."""
        return getattr(self.target.lm, "engine", None) == "litellm" and not _typed(args)

    def _twin(self, tags: dict[str, Any]) -> Any:
        """Return a plain copy of the target for one request: no cache, no retries, no callbacks."""
        lm = self.target.lm
        twin: Any = object.__new__(self.target.kind)
        twin.__dict__.update(lm.__dict__)
        twin.cache = False
        twin.num_retries = 0
        twin.callbacks = TOLD
        twin.history = self.target.history
        twin.update_history = functools.partial(self._take_record, twin)
        twin.kwargs = {**self.settings, **tags}
        return twin

    def _traced(self) -> contextlib.AbstractContextManager[None]:
        tracer = self.client.tracer
        return _NOTHING if tracer is None else tracer.attempt(self)

    def _settings(self, args: tuple[Any, ...]) -> contextlib.AbstractContextManager[None]:
        settings: dict[str, Any] = {}
        if self.call.streams:
            self._stream = settings["send_stream"] = WatchedStream(
                dspy.settings.send_stream,
                ends_truly=ends_truly(self.target.lm, typed=_typed(args)),
                broken_off=lambda: broken_off(self._ending.said()),
            )
        if dspy.settings.disable_history:
            settings["disable_history"] = False  # the entry tells whether the answer is complete
            self._discard = True
        return dspy.context(**settings) if settings else _NOTHING

    def _take_record(self, twin: Any, entry: dict[str, Any]) -> None:
        """Receive DSPy's history entry, complete it, and pass it on to DSPy."""
        self._record = entry
        if self._discard or (self._stream is not None and self._stream.flaw):
            return
        entry["kwargs"] = self.call.recorded()
        entry["attempts"] = self.call.attempts
        kind: Any = self.target.kind
        kind.update_history(twin, entry)

    def _answer(self, outputs: Any) -> Answer:
        if isinstance(outputs, list) and not outputs:
            raise dspy.LMServerError(
                "the provider answered without a single choice", model=self.target.lm.model
            )
        if self._stream is not None and (flaw := self._stream.flaw):
            raise dspy.LMStreamAssemblyError(flaw, model=self.target.lm.model)
        said = self._ending.said()
        if reason := broken_off(said) or broken_off(self.record.get("response", outputs)):
            raise dspy.LMServerError(
                f"the provider did not finish its answer: {reason}", model=self.target.lm.model
            )
        return Answer.of(outputs, self._record, target=self.route.label, stored_at=self._clock())

    def succeed(self) -> None:
        """Report the answer to circuit, gate and limits."""
        self._mark.ended = True
        self.seconds = self._clock() - self._started
        self._account(self._billed())
        self.route.note_answer(self._started, self.seconds)
        self._admission.answered()
        self._gate_permit.answered()
        if self._slot is not None:
            self._slot.release(tokens=_tokens(self.record), slow=self.route.is_slow(self.seconds))

    def settle(self, error: BaseException) -> Verdict:
        """Return the verdict on `error`, reporting it the first time; later calls change nothing.

        What a stream's consumer has seen is not said again by anybody.
        """
        self._mark.ended = True
        try:
            verdict = self._settle(error)
        except BaseException:  # Ctrl-C: other calls must not go without these places for ever
            self._make_room()
            raise
        if self.emitted:
            return dataclasses.replace(verdict, retry=False, next_target=False, special=False)
        return verdict

    def _witness(self, evidence: providers.CallbackEvent) -> None:
        """Hear of a failure from LiteLLM, which may yet find another way to an answer."""
        self._evidence = evidence

    def _settle(self, error: BaseException) -> Verdict:
        with self._settling:
            if self._verdict is None:
                self.seconds = self._clock() - self._started
                self._verdict = self._judge(error)
        verdict = self._verdict
        if not self._reported and (not self._left_behind or verdict.outcome == Outcome.FAILURE):
            self._report(verdict, error)
            self._reported = True
        elif not self._reported:
            self._make_room()
        return verdict

    def _judge(self, error: BaseException) -> Verdict:
        facts = self._evidence.facts_of(error) if self._evidence is not None else {}
        broken = self._is_broken if self._http is None else self._http.is_broken
        return classify(
            error,
            seconds=self.seconds,
            timeout=self.route.patience(self.turn.timeout),
            broken=broken,
            **facts,
        )

    def _billed(self) -> Spending:
        """Return what the answer cost, by DSPy's history entry of it."""
        price = price_of(self.target.lm.model)
        return Spending.of(
            self.record, lambda tokens: None if price is None else price.cost(tokens)
        )

    def _account(self, spent: Spending) -> None:
        """Count what the request cost; what comes later corrects what came before."""
        before, self._spent = self._spent, spent
        self.client.tally.spend(self.label, spent - before if before else spent)
        if self._funds is not None:
            self._funds.settle(spent)

    def _report(self, verdict: Verdict, error: BaseException) -> None:
        if self._record is not None:  # an answer that is of no use is billed all the same
            self._account(self._billed())
        elif verdict.kind is not Kind.LOCAL:
            is_open = verdict.kind in _MAYBE_BILLED and may_be_billed(error)
            self._account(UNANSWERED if is_open else NOT_BILLED)
        elif self._funds is not None:
            self._funds.release()
        if verdict.outcome == Outcome.FAILURE:
            self.route.note_failure(self._started)
        self._admission.failed(verdict, error)
        throttled = verdict.kind is Kind.THROTTLED
        if throttled or (verdict.kind is Kind.FAILURE and verdict.retry_after is not None):
            self.paused = self._gate_permit.throttled(verdict.retry_after)
        else:
            self._gate_permit.release()
        if self._slot is not None:
            self._slot.release(tokens=0 if throttled else None, throttled=throttled, ok=False)

    def leave_behind(self) -> DeadlineExceededError:
        """Return the error for a caller who gives up while the request goes on.

        It holds up no other call any more. What comes of it in the end is still reported to the
        circuit, unless it has run long enough to count as a failure already.
        """
        self._left_behind = True
        return self.out_of_time()

    def _make_room(self) -> None:
        """Give back the places at gate and limits."""
        self._gate_permit.release()
        if self._slot is not None:
            self._slot.release(ok=False)

    def arrive_late(self, answer: Answer) -> None:
        """Report an answer whose caller has given up, and keep it for the next one."""
        self.succeed()
        client, cache = self.client, self.client.cache
        client.store(self.key, answer, self.flaw)
        if answer.key:
            cache.save(answer)
            if cache.others is not None:
                cache.others.store(answer)

    def fail_late(self, error: BaseException) -> None:
        """Report a failure whose caller has given up."""
        self.seconds = self._clock() - self._started
        self._report(self._judge(error), error)

    def out_of_time(self) -> DeadlineExceededError:
        """Return the error of an attempt that was under way when the deadline passed."""
        name = self.client.name
        return DeadlineExceededError(
            f"client {name!r}: no answer within the deadline of {self.call.budget:g} s; "
            f"{self.route.label} was still being waited for",
            client=name,
        )


def _typed(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], dspy.lm15.Request)


def _tokens(record: dict[str, Any]) -> int | None:
    total = (record.get("usage") or {}).get("total_tokens")
    return total if isinstance(total, int) and math.isfinite(total) else None
