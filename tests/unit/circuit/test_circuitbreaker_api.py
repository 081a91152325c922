"""What users of the `circuitbreaker` package find again, and what no longer goes wrong for them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import inspect
import threading
import weakref
from datetime import UTC, datetime, timedelta

import circuitbreaker
import pytest
from circuitbreaker import CircuitBreakerError, CircuitBreakerMonitor

from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.errors import CircuitOpenError, ThrottledError
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.testing import Clock


class ServerError(Exception):
    retry_after = None


@pytest.fixture
def clock():
    return Clock()


def raise_(error):
    raise error


def fail(breaker, error=None):
    """Let a call under `breaker` end with `error`."""
    error = error or ServerError()
    with pytest.raises(type(error)):
        breaker.call(raise_, error)


# The package's form


def test_it_is_a_circuitbreaker():
    """Whoever expects the package's class, or its error, gets one."""
    breaker = CircuitBreaker()
    assert isinstance(breaker, circuitbreaker.CircuitBreaker)
    breaker.trip()
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)


def test_defaults_are_the_packages():
    """Without arguments: 5 failures, 30 s, fixed, one success closes."""
    clock = Clock()
    breaker = CircuitBreaker(clock=clock)
    for _ in range(4):
        fail(breaker)
    assert breaker.closed
    for _ in range(3):
        fail(breaker)
        assert breaker.open_remaining == 30
        clock.advance(30)
    assert breaker.state == "half_open"
    breaker.call(int)
    assert breaker.closed


def test_class_attributes_are_the_defaults():
    """None means the class attribute, so the package's way of subclassing works."""

    class Own(CircuitBreaker):
        FAILURE_THRESHOLD = 1
        RECOVERY_TIMEOUT = 7
        EXPECTED_EXCEPTION = KeyError

        def FALLBACK_FUNCTION(self, *args):  # noqa: N802  # the package's name
            return "fallback"

    clock = Clock()

    @circuitbreaker.circuit(cls=lambda **kwargs: Own(clock=clock, **kwargs))
    def look(error):
        raise error

    with pytest.raises(ServerError):
        look(ServerError())
    with pytest.raises(KeyError):
        look(KeyError())
    assert look(KeyError()) == "fallback"
    assert CircuitBreakerMonitor.get(look.__qualname__).open_remaining == 7


def test_packages_decorator_takes_this_class():
    """`@circuit(cls=CircuitBreaker)` works with and without numbers."""

    @circuitbreaker.circuit(cls=CircuitBreaker)
    def plain():
        return 1

    @circuitbreaker.circuit(failure_threshold=2, recovery_timeout=3, cls=CircuitBreaker)
    def numbered():
        return 2

    assert (plain(), numbered()) == (1, 2)
    policy = CircuitBreakerMonitor.get(numbered.__qualname__).policy
    assert (policy.failure_threshold, policy.recovery_time) == (2, 3)


def test_positional_arguments_are_the_packages():
    """`CircuitBreaker(3, 10, KeyError, "name", fallback)` means what it did."""
    breaker = CircuitBreaker(3, 10, KeyError, "positional", int)
    assert breaker.policy.failure_threshold == 3
    assert breaker.policy.recovery_time == 10
    assert breaker.is_failure(KeyError, KeyError())
    assert str(breaker) == breaker.name == "positional"
    assert breaker.fallback_function is int


def test_only_failures_in_a_row_open_it():
    """The package knows no rate: half of all calls may fail for ever."""
    breaker = CircuitBreaker(2)
    for _ in range(100):
        fail(breaker)
        breaker.call(int)
    assert breaker.closed
    fail(breaker)
    fail(breaker)
    assert breaker.opened


def test_states_are_the_packages_strings(clock):
    """Whoever compares with the package's constants goes on doing so."""
    breaker = CircuitBreaker(1, 5, clock=clock)
    assert breaker.state == circuitbreaker.STATE_CLOSED
    fail(breaker)
    assert breaker.state == circuitbreaker.STATE_OPEN
    clock.advance(5)
    assert breaker.state == circuitbreaker.STATE_HALF_OPEN
    assert f"{breaker.state}" == "half_open"


def test_policy_may_be_given_by_name():
    """`policy=` is as good as the first place, and the circuit is ours then."""
    policy = CircuitPolicy(failure_threshold=2)
    assert CircuitBreaker(policy=policy).policy is policy


def test_expected_exception_is_no_text():
    """The package's guard against a name in the wrong place."""
    with pytest.raises(ValueError, match="Did you mean name"):
        CircuitBreaker(1, 5, "my circuit")


@pytest.mark.parametrize("name", ["failure_threshold", "recovery_timeout"])
@pytest.mark.parametrize("value", [0, -1])
def test_zero_is_no_default(name, value):
    """0 is refused, not replaced."""
    with pytest.raises(ValueError, match=f"^CircuitBreaker: {name} must be .*got {value}"):
        CircuitBreaker(**{name: value})


@pytest.mark.parametrize("value", ["5", 2.5, True])
def test_thresholds_are_whole_numbers(value):
    """Nonsense is refused by name."""
    with pytest.raises(TypeError, match=r"^CircuitBreaker: failure_threshold must be"):
        CircuitBreaker(value)


@pytest.mark.parametrize(
    "expected",
    [KeyError, (KeyError, ServerError), [KeyError], lambda kind, error: kind is KeyError],
    ids=["class", "tuple", "list", "predicate"],
)
def test_expected_exceptions_take_every_form(expected):
    """A class, several, or a predicate say what is a failure."""
    breaker = CircuitBreaker(1, expected_exception=expected)
    fail(breaker, ValueError())
    assert breaker.closed
    fail(breaker, KeyError())
    assert breaker.opened


def test_expected_exceptions_work_with_a_policy():
    """The policy says how many, the predicate says which."""
    breaker = CircuitBreaker(CircuitPolicy(failure_threshold=1), expected_exception=KeyError)
    fail(breaker, ValueError())
    fail(breaker, KeyError())
    assert breaker.opened


def test_unexpected_exception_is_no_success():
    """A "400" between failures does not reset the count."""
    breaker = CircuitBreaker(3, expected_exception=ConnectionError)
    fail(breaker, ConnectionError())
    fail(breaker, ValueError())
    assert breaker.failure_count == 1


def test_unexpected_exception_closes_no_half_open_circuit(clock):
    """A probe's bad request says nothing."""
    breaker = CircuitBreaker(1, 5, ConnectionError, clock=clock)
    fail(breaker, ConnectionError())
    clock.advance(5)
    fail(breaker, ValueError())
    assert breaker.state == "open"
    clock.advance(5)
    breaker.call(int)
    assert breaker.closed


def test_failing_predicate_loses_no_permit(clock):
    """A predicate that raises is heard, and its probe is neutral."""
    breaker = CircuitBreaker(1, 5, lambda kind, error: 1 / 0, clock=clock)
    breaker.trip()
    clock.advance(5)
    with pytest.raises(ZeroDivisionError):
        breaker.call(raise_, KeyError())
    assert breaker.state == "open"
    assert breaker.wait_time() == 5


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(),
        GeneratorExit(),
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
        CircuitOpenError("nested"),
        ThrottledError("nested"),
    ],
    ids=lambda error: f"{type(error).__module__}.{type(error).__name__}",
)
def test_what_says_nothing_is_neutral(clock, error):
    """Ctrl-C, cancellation and our own refusals are no verdict, even to a greedy predicate."""
    breaker = CircuitBreaker(1, 5, lambda kind, error: True, clock=clock)
    fail(breaker, error)
    assert breaker.closed
    breaker.trip()
    clock.advance(5)
    fail(breaker, error)
    assert (breaker.state, breaker.failure_count) == ("open", 0)


def test_retry_after_of_an_error_is_heard(clock):
    """An error that carries a hint keeps a policy's circuit open for so long."""
    breaker = CircuitBreaker(CircuitPolicy(failure_threshold=1), clock=clock)
    error = ServerError()
    error.retry_after = 42
    fail(breaker, error)
    assert breaker.open_remaining == 42


def test_properties_of_the_package_hold(clock):
    """`opened`, `closed`, `failure_count`, `last_failure`, `open_until`."""
    breaker = CircuitBreaker(2, 60, clock=clock)
    assert (breaker.opened, breaker.closed, breaker.open_remaining) == (False, True, 0)
    assert breaker.last_failure is None
    fail(breaker, ServerError("boom"))
    assert breaker.failure_count == 1
    fail(breaker, ServerError("boom"))
    assert (breaker.opened, breaker.closed) == (True, False)
    assert breaker.last_failure == "ServerError: boom"
    left = breaker.open_until - datetime.now(UTC)  # noqa: TID251  # what people read
    assert timedelta(seconds=50) < left <= timedelta(seconds=60)
    breaker.force_open()
    assert breaker.opened
    assert breaker.open_until == datetime.max.replace(tzinfo=UTC)
    breaker.force_closed()
    assert breaker.closed
    breaker.reset()
    assert breaker.last_failure is None


# The forms of use


def test_function_is_guarded(clock):
    """A decorated function asks, reports, and refuses."""
    breaker = CircuitBreaker(1, 5, clock=clock)

    @breaker
    def divide(a, b=1):
        """Divide."""
        return a / b

    assert divide(6, b=2) == 3
    assert (divide.__name__, divide.__doc__) == ("divide", "Divide.")
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)
    with pytest.raises(CircuitOpenError):
        divide(1)
    clock.advance(5)
    assert divide(1) == 1
    assert breaker.closed


def test_methods_and_callables_are_guarded():
    """`self` arrives; a callable without a name is one, too."""

    class Thing:
        @CircuitBreaker(1)
        def double(self, x):
            return 2 * x

        def __call__(self):
            return "called"

    assert Thing().double(4) == 8
    assert CircuitBreaker(1)(Thing())() == "called"


async def test_coroutine_function_is_guarded(clock):
    """A decorated coroutine function reports when it ends, not when it is called."""
    breaker = CircuitBreaker(2, 5, clock=clock)

    @breaker
    async def work(error=None):
        await asyncio.sleep(0)
        if error:
            raise error
        return "done"

    assert inspect.iscoroutinefunction(work)
    with pytest.raises(ServerError):
        await work(ServerError())
    assert breaker.failure_count == 1
    assert await work() == "done"
    assert breaker.failure_count == 0
    coroutines = [work(ServerError()) for _ in range(2)]
    assert breaker.closed
    for coroutine in coroutines:
        with pytest.raises(ServerError):
            await coroutine
    assert breaker.opened
    with pytest.raises(CircuitOpenError):
        await work()


def test_generator_is_guarded_to_its_end():
    """Failure in the middle counts, the end is the success; values go both ways."""
    breaker = CircuitBreaker(2)

    @breaker
    def numbers(error=None):
        got = yield 1
        yield got
        if error:
            raise error

    assert inspect.isgeneratorfunction(numbers)
    with pytest.raises(ServerError):
        list(numbers(ServerError()))
    assert breaker.failure_count == 1
    running = numbers()
    assert next(running) == 1
    assert running.send("sent") == "sent"
    assert breaker.failure_count == 1
    with pytest.raises(StopIteration):
        next(running)
    assert breaker.failure_count == 0


async def test_async_generator_is_guarded_to_its_end():
    """Failure in the middle counts, the end is the success."""
    breaker = CircuitBreaker(2)

    @breaker
    async def numbers(error=None):
        yield 1
        if error:
            raise error

    assert inspect.isasyncgenfunction(numbers)
    with pytest.raises(ServerError):
        [n async for n in numbers(ServerError())]
    assert breaker.failure_count == 1
    assert [n async for n in numbers()] == [1]
    assert breaker.failure_count == 0


def test_generator_asks_when_it_starts(clock):
    """Nothing is asked before the first item, for nothing is sent before."""
    breaker = CircuitBreaker(1, 5, clock=clock)
    numbers = breaker(lambda: (yield 1))()
    breaker.trip()
    with pytest.raises(CircuitOpenError):
        next(numbers)


def test_abandoned_generator_is_neutral_at_once(clock):
    """A consumer that stops early says nothing about the provider."""
    breaker = CircuitBreaker(1, 5, clock=clock)

    @breaker
    def numbers():
        yield 1
        yield 2

    breaker.trip()
    clock.advance(5)
    running = numbers()
    next(running)
    assert breaker.state == "half_open"
    running.close()
    assert breaker.state == "open"


async def test_abandoned_async_generator_is_neutral(clock):
    """The same for `aclose`; the inner generator is closed with it."""
    breaker = CircuitBreaker(1, 5, clock=clock)
    closed = []

    @breaker
    async def numbers():
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    breaker.trip()
    clock.advance(5)
    running = numbers()
    await anext(running)
    assert breaker.state == "half_open"
    await running.aclose()
    del running
    for _ in range(10):
        await asyncio.sleep(0)  # the loop closes what the package's wrapper leaves behind
    assert closed
    assert breaker.state == "open"


def test_refused_call_goes_to_the_fallback():
    """The fallback gets the arguments and answers in place of the function."""
    breaker = CircuitBreaker(1, fallback_function=lambda x: -x)
    double = breaker(lambda x: 2 * x)
    assert double(4) == 8
    breaker.trip()
    assert double(4) == -4


async def test_fallback_is_of_the_same_kind():
    """A coroutine for a coroutine, a generator for a generator."""

    async def coroutine():
        return "c"

    def generator():
        yield "g"

    async def async_generator():
        yield "a"

    for function in (coroutine, generator, async_generator):
        breaker = CircuitBreaker(1, fallback_function=function)
        breaker.trip()
        result = breaker(function)()
        if function is coroutine:
            assert await result == "c"
        elif function is generator:
            assert list(result) == ["g"]
        else:
            assert [each async for each in result] == ["a"]


def test_block_asks_and_reports():
    """`with breaker:` refuses while open, counts, and hands out its permit."""
    breaker = CircuitBreaker(1)
    with breaker as permit:
        assert permit.circuit is breaker
    with pytest.raises(ServerError), breaker:
        raise ServerError
    assert breaker.opened
    with pytest.raises(CircuitOpenError), breaker:
        pytest.fail("entered")


async def test_async_block_asks_and_reports():
    """`async with breaker:` does the same."""
    breaker = CircuitBreaker(1)
    async with breaker:
        await asyncio.sleep(0)
    with pytest.raises(ServerError):
        async with breaker:
            raise ServerError
    with pytest.raises(CircuitOpenError):
        async with breaker:
            pytest.fail("entered")


def test_report_in_a_block_stands():
    """A block may know better than its end."""
    breaker = CircuitBreaker(1)
    with breaker as permit:
        permit.failure("a 200 with an error in it")
    assert breaker.opened


def test_nested_blocks_report_each_for_itself():
    """An inner block's failure that is handled does not fail the outer."""
    outer, inner = CircuitBreaker(1), CircuitBreaker(1)
    with outer:
        with pytest.raises(ServerError), inner, outer, inner:
            raise ServerError
        assert inner.opened
    assert outer.opened  # its inner block failed
    assert inner.failure_count == 1  # the second report was of an older generation


def test_block_within_a_block_of_the_same_circuit_reports_for_itself():
    """Each end belongs to the innermost block that is still open."""
    breaker = CircuitBreaker(9)
    reported = []

    def nested():
        with breaker as outer:
            with breaker as inner:
                pass
            reported.append((inner.reported, outer.reported))
            raise ServerError

    with pytest.raises(ServerError):
        nested()
    assert reported == [(True, False)]
    assert breaker.failure_count == 1


def test_blocks_of_several_circuits_may_end_in_any_order():
    """As those of generators do that take turns."""
    breakers = [CircuitBreaker(9) for _ in range(3)]
    permits = [breaker.__enter__() for breaker in breakers]
    for ended, breaker in enumerate(breakers, 1):
        breaker.__exit__(None, None, None)
        assert [permit.reported for permit in permits] == [n < ended for n in range(3)]


async def test_blocks_of_tasks_do_not_mix(clock):
    """Each task leaves with its own permit, whatever the order."""
    breaker = CircuitBreaker(9, 5, clock=clock)
    first_may_end, second_may_end = asyncio.Event(), asyncio.Event()
    permits = {}

    async def work(name, may_end, error):
        with breaker as permits[name]:
            await may_end.wait()
            if error:
                raise error

    async with asyncio.TaskGroup() as group:
        group.create_task(work("first", first_may_end, None))
        second = asyncio.gather(
            work("second", second_may_end, ServerError()), return_exceptions=True
        )
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first_may_end.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert permits["first"].reported
        assert not permits["second"].reported
        second_may_end.set()
        await second
    assert breaker.failure_count == 1


def test_blocks_of_threads_do_not_mix():
    """Each thread leaves with its own permit."""
    breaker = CircuitBreaker(9)
    permits = {}
    entered, may_end = threading.Barrier(2), threading.Event()

    def work():
        with breaker as permits["thread"]:
            entered.wait()
            may_end.wait()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait()
    with breaker as permits["main"]:
        pass
    assert permits["main"].reported
    assert not permits["thread"].reported
    may_end.set()
    thread.join()
    assert permits["thread"].reported


def test_block_left_in_a_foreign_context_harms_nobody():
    """A block that ends where it did not begin takes nobody else's permit."""
    breaker = CircuitBreaker(1)

    def block():
        with breaker:
            yield

    running = contextvars.copy_context().run(lambda: (b := block(), next(b))[0])
    with breaker as permit:
        breaker2 = CircuitBreaker(1)
        with breaker2:
            pass
        assert not permit.reported
    running.close()
    assert breaker.closed


# The monitor


def test_named_breakers_are_monitored():
    """A circuit can be found by its name."""
    breaker = CircuitBreaker(CircuitPolicy(), name="monitored")
    found = CircuitBreakerMonitor.get("monitored")
    assert found == breaker
    assert isinstance(found, circuitbreaker.CircuitBreaker)
    assert breaker in CircuitBreakerMonitor.get_circuits()
    assert breaker in CircuitBreakerMonitor.get_closed()
    breaker.trip()
    assert "monitored" in [each.name for each in CircuitBreakerMonitor.get_open()]
    assert breaker not in CircuitBreakerMonitor.get_closed()
    assert not CircuitBreakerMonitor.all_closed()


def test_names_are_unique():
    """No circuit hides another of the same name."""
    breakers = [CircuitBreaker(CircuitPolicy(), name="twin") for _ in range(3)]
    assert [breaker.name for breaker in breakers] == ["twin", "twin-2", "twin-3"]
    for breaker in breakers:
        assert CircuitBreakerMonitor.get(breaker.name) == breaker


def test_decorating_names_the_nameless():
    """Like in the package, the function gives the name; the circuit keeps it."""
    breaker = CircuitBreaker()
    assert breaker.name is None
    breaker(raise_)
    breaker(fail)
    assert breaker.name == "raise_"
    assert CircuitBreakerMonitor.get("raise_") == breaker


def test_monitor_keeps_nobody_alive():
    """A forgotten circuit disappears from the monitor."""
    breaker = CircuitBreaker(CircuitPolicy(), name="short-lived")
    watch = weakref.ref(breaker)
    assert "short-lived" in CircuitBreakerMonitor.circuit_breakers
    del breaker
    gc.collect()
    assert watch() is None
    assert "short-lived" not in CircuitBreakerMonitor.circuit_breakers


def test_leaving_the_monitor_takes_nobody_else_along():
    """A name that the package has meanwhile given away stays."""
    breaker = CircuitBreaker(CircuitPolicy(), name="contested")
    stock = circuitbreaker.CircuitBreaker(name="contested")
    stock.decorate(int)
    del breaker
    gc.collect()
    assert CircuitBreakerMonitor.get("contested") is stock
    del CircuitBreakerMonitor.circuit_breakers["contested"]


def test_decorating_is_the_packages():
    """The wrappers are those of `circuitbreaker`, whatever they come to be."""
    assert circuitbreaker.CircuitBreaker.decorate.__code__.co_filename == (
        CircuitBreaker()(int).__code__.co_filename
    )


def test_decorated_function_keeps_its_circuit_alive():
    """The wrapped function holds the circuit that guards it."""
    function = CircuitBreaker(name="held")(int)
    gc.collect()
    assert "held" in CircuitBreakerMonitor.circuit_breakers
    del function
    gc.collect()
    assert "held" not in CircuitBreakerMonitor.circuit_breakers
