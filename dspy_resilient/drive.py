"""The two drivers: they perform the steps that `call.complete` yields, and decide nothing.

`run` blocks its thread; `arun` awaits on the running loop, whichever loop that is. Both hand
results and errors of every kind back into the generator.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import math
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from dspy_resilient import providers
from dspy_resilient.call import Disk, Prepare, Wait
from dspy_resilient.clerk import Clerk

if TYPE_CHECKING:
    from dspy_resilient.attempt import Attempt
    from dspy_resilient.cache import Answer
    from dspy_resilient.call import Steps

T = TypeVar("T")


def on_a_loop() -> bool:
    """Whether an event loop is running on this thread, so that blocking could stop its tasks."""
    return asyncio._get_running_loop() is not None  # noqa: SLF001  # the documented fast spelling


_LONGEST_WAIT = threading.TIMEOUT_MAX
_clerk = Clerk()


def run(steps: Steps[T]) -> T:
    """Drive `steps` to the end on this thread and return its result."""
    resume: Any = steps.send
    value: Any = None
    while True:
        try:
            step = resume(value)
        except StopIteration as end:
            result: T = end.value
            return result
        try:
            value = _perform(step)
        except BaseException as error:  # noqa: BLE001  # every kind belongs to the generator
            resume, value = steps.throw, error
        else:
            resume = steps.send


async def arun(steps: Steps[T]) -> T:
    """Drive `steps` to the end on the running loop and return its result."""
    resume: Any = steps.send
    value: Any = None
    while True:
        try:
            step = resume(value)
        except StopIteration as end:
            result: T = end.value
            return result
        try:
            value = await _aperform(step)
        except BaseException as error:  # noqa: BLE001  # every kind belongs to the generator
            resume, value = steps.throw, error
        else:
            resume = steps.send


def _perform(step: Wait | Prepare | Disk | Attempt) -> Any:
    if isinstance(step, Wait):
        return _wait(step)
    if isinstance(step, Prepare):
        return providers.load()
    if isinstance(step, Disk):
        return step.work()
    if step.call.streams:
        from anyio import from_thread  # noqa: PLC0415  # a DSPy sync stream runs in AnyIO's thread

        if math.isfinite(step.limit):
            return from_thread.run(functools.partial(_attempt_within, step))
        from_thread.run(providers.tend)
    return step.run() if math.isinf(step.limit) else _attempt_in_thread(step)


async def _aperform(step: Wait | Prepare | Disk | Attempt) -> Any:
    if isinstance(step, Wait):
        return await _await(step)
    if isinstance(step, Prepare):
        return await asyncio.to_thread(providers.load)
    if isinstance(step, Disk):
        return await _await(Wait(_clerk.do(step.work)))
    return await (_attempt(step) if math.isinf(step.limit) else _attempt_within(step))


def _wait(step: Wait) -> Any:
    if step.future is None:
        return time.sleep(step.seconds)
    try:
        return step.future.result(None if step.seconds > _LONGEST_WAIT else step.seconds)
    except concurrent.futures.TimeoutError:
        return None


async def _await(step: Wait) -> Any:
    if step.future is None:
        return await asyncio.sleep(step.seconds)
    loop = asyncio.get_running_loop()
    woken: asyncio.Event = asyncio.Event()

    def wake(_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(woken.set)

    step.future.add_done_callback(wake)
    try:
        async with asyncio.timeout(None if math.isinf(step.seconds) else step.seconds):
            await woken.wait()
    except TimeoutError:
        return None
    return step.future.result()


async def _attempt(attempt: Attempt) -> Answer:
    await providers.tend()
    return await attempt.arun()


async def _attempt_within(attempt: Attempt) -> Answer:
    """Run `attempt` under its time limit; past it the attempt is cancelled."""
    limit = asyncio.timeout(attempt.limit)
    try:
        async with limit:
            return await _attempt(attempt)
    except TimeoutError:
        if limit.expired():
            raise attempt.out_of_time() from None
        raise


def _attempt_in_thread(attempt: Attempt) -> Answer:
    """Run `attempt` on a daemon thread of its own and leave it behind when the time is up.

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
        return future.result(attempt.limit)
    except concurrent.futures.TimeoutError:
        if future.cancel():
            raise attempt.leave_behind() from None
        return future.result()
    except BaseException:
        future.cancel()
        raise
