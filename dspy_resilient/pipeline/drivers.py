"""The two drivers: they perform the steps that `call.complete` yields, and decide nothing.

`run` blocks its thread; `arun` awaits on the running loop, whichever loop that is. Both hand
results and errors of every kind back into the generator.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import math
import threading
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from dspy_resilient import providers
from dspy_resilient.pipeline.state import Disk, Prepare, Wait

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from dspy_resilient.cache import Answer
    from dspy_resilient.pipeline.attempt import Attempt
    from dspy_resilient.pipeline.in_flight import InFlight, Running
    from dspy_resilient.pipeline.state import Steps

T = TypeVar("T")


def on_a_loop() -> bool:
    """Whether an event loop is running on this thread, so that blocking could stop its tasks."""
    return running_loop() is not None


def running_loop() -> object:
    """Return the event loop that is running on this thread, or None."""
    return asyncio._get_running_loop()  # noqa: SLF001  # the documented fast spelling


_LONGEST_WAIT = threading.TIMEOUT_MAX
_PATIENCE_WITH_A_DISK = 5.0  # seconds, after which the answer is not there, or not kept
_UNWINDING = 5.0


def run(steps: Steps[T], running: Running) -> T:
    """Drive `steps` to the end on this thread and return its result; what ends it ends `running`."""
    resume: Any = steps.send
    value: Any = None
    with running, closing(steps):  # Ctrl-C may strike, and its traceback would keep them open
        while True:
            try:
                step = resume(value)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                value = _perform(step, running)
            except BaseException as error:  # noqa: BLE001  # every kind belongs to the generator
                resume, value = steps.throw, error
            else:
                resume = steps.send


def arun(steps: Steps[T], running: Running) -> Coroutine[Any, Any, T]:
    """Drive `steps` to the end on the running loop and return its result, as `run` does.

    Once that loop is closed nothing goes on, whatever is made of the end in a step: who closes the
    coroutine then is on a thread and in a context that are somebody else's.
    """
    coroutine = _arun(steps, running)
    running.depend_on(asyncio.get_running_loop(), asyncio.current_task(), coroutine)
    return coroutine


async def _arun(steps: Steps[T], running: Running) -> T:
    resume: Any = steps.send
    value: Any = None
    with running, closing(steps):  # Ctrl-C may strike, and its traceback would keep them open
        while True:
            try:
                step = resume(value)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                value = await _aperform(step, running)
            except BaseException as error:
                if running.is_stranded:
                    raise
                resume, value = steps.throw, error
            else:
                resume = steps.send


def see_off(calls: InFlight, grace: float) -> Steps[None]:
    """Let the calls of a client that is being closed go on for `grace` seconds, then end them."""
    idle = calls.idle()
    yield Wait(idle, grace)
    calls.end()
    yield Wait(idle, _UNWINDING)


def _perform(step: Wait | Prepare | Disk | Attempt, running: Running) -> Any:
    if isinstance(step, Wait):
        return _wait(step, running)
    if isinstance(step, Prepare):
        return providers.load()
    if isinstance(step, Disk):
        return step.work() if math.isinf(step.seconds) else _wait(_on_worker(step), running)
    may_leave = math.isfinite(step.limit) or running.calls.are_endable
    if step.call.streams:
        from anyio import from_thread  # noqa: PLC0415  # a DSPy sync stream runs in AnyIO's thread

        if may_leave:
            return from_thread.run(_attempt_within, step, running)
        return step.run(from_thread.run(providers.running_loop))
    return _attempt_in_thread(step, running) if may_leave else step.run()


async def _aperform(step: Wait | Prepare | Disk | Attempt, running: Running) -> Any:
    if isinstance(step, Wait):
        return await _await(step, running)
    if isinstance(step, Prepare):
        return await asyncio.to_thread(providers.load)
    if isinstance(step, Disk):
        return await _await(_on_worker(step), running)
    return await _attempt_within(step, running)


def _on_worker(step: Disk) -> Wait:
    return Wait(step.worker.do(step.work), min(step.seconds, _PATIENCE_WITH_A_DISK))


def _wait(step: Wait, running: Running) -> Any:
    woken = threading.Event()
    if step.future is not None:
        step.future.add_done_callback(lambda _: woken.set())
    with running.ended_by(woken.set):
        woken.wait(min(step.seconds, _LONGEST_WAIT))
    running.calls.check()
    return step.future.result() if step.future is not None and step.future.done() else None


async def _await(step: Wait, running: Running) -> Any:
    loop = asyncio.get_running_loop()
    woken: asyncio.Event = asyncio.Event()

    def wake(_: object = None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(woken.set)

    if step.future is not None:
        step.future.add_done_callback(wake)
    is_timed = step.seconds < _LONGEST_WAIT
    timer = loop.call_later(max(0.0, step.seconds), woken.set) if is_timed else None
    try:
        with running.ended_by(wake):
            await woken.wait()
    finally:
        if timer is not None:
            timer.cancel()
    running.calls.check()
    return step.future.result() if step.future is not None and step.future.done() else None


async def _attempt_within(attempt: Attempt, running: Running) -> Answer:
    """Run `attempt` under its time limit; past it, or when it is ended, the attempt is cancelled."""
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout(None if math.isinf(attempt.limit) else attempt.limit)
    try:
        async with limit:
            with running.ended_by(lambda: loop.call_soon_threadsafe(_expire, limit)):
                return await attempt.arun()
    except TimeoutError:
        if limit.expired():
            running.calls.check()
            raise attempt.out_of_time() from None
        raise


def _expire(limit: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # it is over by now
        limit.reschedule(0.0)


def _attempt_in_thread(attempt: Attempt, running: Running) -> Answer:
    """Run `attempt` on a daemon thread of its own; leave it behind at the time limit, or when ended.

    Never a pool: a pool's hung thread holds up the interpreter's exit. The thread carries the
    caller's context. Whoever comes second finds the future taken: an answer that arrives too late
    still goes into the cache, and its permit still reports.
    """
    future: concurrent.futures.Future[Answer] = concurrent.futures.Future()
    context = contextvars.copy_context()

    def body() -> None:
        try:
            answer = context.run(attempt.run)
        except BaseException as error:  # noqa: BLE001  # handed to the caller, or settled late
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            else:
                attempt.fail_late(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(answer)
            else:
                attempt.arrive_late(answer)

    threading.Thread(target=body, name=f"attempt:{attempt.label}", daemon=True).start()
    try:
        with running.ended_by(future.cancel):
            return future.result(None if attempt.limit > _LONGEST_WAIT else attempt.limit)
    except concurrent.futures.TimeoutError:
        if future.cancel():
            raise attempt.leave_behind() from None
        return future.result()
    except concurrent.futures.CancelledError:
        attempt.leave_behind()
        running.calls.check()
        raise
    except BaseException:
        future.cancel()
        raise
