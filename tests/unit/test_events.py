"""Events are facts; they arrive in order, and nobody waits for whoever listens."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import io
import json
import logging
import os
import pickle
import re
import sys
import threading
import time
from datetime import UTC, datetime

import pytest
from tqdm import tqdm

from dspy_resilient import CircuitBreaker, CircuitPolicy, events
from dspy_resilient._support import deliverer, turns, worker
from dspy_resilient.events import (
    CallFinished,
    CircuitClosed,
    CircuitHalfOpened,
    CircuitOpened,
    ClientRestarted,
    Event,
    FellBack,
    Hub,
    RetryScheduled,
    StoreFound,
    StoreLost,
    Throttled,
    WaitStarted,
)

KINDS = [
    each
    for each in vars(events).values()
    if isinstance(each, type) and issubclass(each, Event) and each is not Event
]
SAMPLES = {
    "seconds": 1.5,
    "attempts": 2,
    "cache_hit": False,
    "age": 3.0,
    "reason": "failures",
    "retry_after": None,
    "hint": 7.0,
    "outcome": "failure",
    "error": "LMServerError",
    "attempt": 2,
    "ahead": 3,
    "in_use": 1,
    "ends": "14:03:25",
}


def sample(kind, **facts):
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    return kind(
        **{"client": "fast", "at": 1.0, "target": "openai/x"}
        | {name: SAMPLES[name] for name in needed if name in SAMPLES}
        | facts
    )


def numbered(number):
    return sample(RetryScheduled, attempt=number)


def in_threads(*bodies):
    threads = [threading.Thread(target=body, daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a thread is stuck"


def eventually(claim):
    """Whether `claim()` holds within 20 seconds."""
    end = time.monotonic() + 20
    while not claim() and time.monotonic() < end:
        time.sleep(0.001)
    return claim()


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_a_frozen_fact(kind):
    """Nobody can change what happened; equal facts are equal."""
    event = sample(kind)
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        event.client = "other"
    assert not hasattr(event, "__dict__")
    assert event == sample(kind)
    assert event == pickle.loads(pickle.dumps(event)) == copy.deepcopy(event)
    assert hash(event) == hash(sample(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_names_its_client_its_target_and_its_time(kind):
    """Every event has client, target and at, and takes nothing by position."""
    event = sample(kind)
    assert (event.client, event.target, event.at) == ("fast", "openai/x", 1.0)
    with pytest.raises(TypeError):
        kind("fast", 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_says_what_happened_in_the_past_tense(kind):
    """Its name is a fact, not an order."""
    assert kind.__doc__
    assert kind.__name__.endswith(("ed", "Back", "Hit", "Lost", "Found"))


def test_one_listener_hears_everything_in_order():
    """Events of one thread arrive as they were emitted."""
    heard = []
    hub = Hub(heard.append)
    for number in range(100):
        hub(numbered(number))
    assert heard == [numbered(number) for number in range(100)]


def test_events_of_many_threads_never_overtake_each_other():
    """Each thread's events arrive in its order, one at a time, none lost or doubled."""
    heard, inside = [], []

    def listen(event):
        inside.append(1)
        assert len(inside) == 1
        heard.append(event)
        inside.pop()

    hub = Hub(listen)
    barrier = threading.Barrier(8)

    def emit_from(thread):
        def body():
            barrier.wait()
            for number in range(200):
                hub(sample(RetryScheduled, client=str(thread), attempt=number))

        return body

    in_threads(*(emit_from(thread) for thread in range(8)))
    assert eventually(lambda: len(heard) == 1600)
    for thread in range(8):
        assert [e.attempt for e in heard if e.client == str(thread)] == list(range(200))


def test_a_blocking_listener_blocks_nobody_else():
    """Other threads emit and go on while a listener is stuck; it hears of it afterwards."""
    entered, go_on, heard = threading.Event(), threading.Event(), []

    def listen(event):
        heard.append(event.attempt)
        if event.attempt == 0:
            entered.set()
            go_on.wait(20)

    hub = Hub(listen)
    stuck = threading.Thread(target=lambda: hub(numbered(0)), daemon=True)
    stuck.start()
    assert entered.wait(20)
    in_threads(lambda: hub(numbered(1)), lambda: hub(numbered(2)))
    assert heard == [0]
    go_on.set()
    stuck.join(20)
    assert eventually(lambda: sorted(heard) == [0, 1, 2])


def test_a_caller_waits_for_its_own_events_only():
    """What other callers noted while a slow listener was busy is left to a thread that ends idle."""
    entered, go_on, may_end = (threading.Event() for _ in range(3))
    heard = []

    def listen(event):
        if event.attempt == 0:
            entered.set()
            assert go_on.wait(20)
        elif event.attempt == 1:
            assert may_end.wait(20)
        heard.append((event.attempt, threading.current_thread().name))

    hub = Hub(listen)
    slow = threading.Thread(target=lambda: hub(numbered(0)), name="slow", daemon=True)
    slow.start()
    assert entered.wait(20)
    in_threads(lambda: hub(numbered(1)), lambda: hub(numbered(2)))
    time.sleep(0.1)  # longer than a quick listener takes
    go_on.set()
    slow.join(20)
    assert not slow.is_alive(), "held up by what others have noted"
    assert heard == [(0, "slow")]
    hub(numbered(3))  # behind them: nothing overtakes
    may_end.set()
    assert eventually(lambda: len(heard) == 4)
    assert [name for _, name in heard] == ["slow", "events", "events", "events"]
    assert [number for number, _ in heard] == [0, 1, 2, 3]


def test_what_waits_for_a_slow_listener_is_bounded(monkeypatch, caplog):
    """The oldest events make room; they are counted, and the log says so once."""
    monkeypatch.setattr(deliverer, "MOST_QUEUED", 10)
    entered, go_on, heard = threading.Event(), threading.Event(), []

    def listen(event):
        entered.set()
        assert go_on.wait(20)
        heard.append(event.attempt)

    hub = Hub(listen)
    threading.Thread(target=lambda: hub(numbered(0)), daemon=True).start()
    assert entered.wait(20)
    for number in range(1, 31):
        hub(numbered(number))
    go_on.set()
    assert eventually(lambda: len(heard) == 11)
    assert heard == [0, *range(21, 31)]
    assert hub.dropped == 20
    (record,) = caplog.records
    assert record.event == "dspy_resilient.events_dropped"


def test_ctrl_c_at_any_instruction_leaves_events_deliverable():
    """However a caller is stopped, the next event arrives, and in order; one may be lost at most.

    Every instruction of an emission that a debugger can stop at is struck once, which is stricter
    than a signal: Python looks for those at some instructions only.
    """
    files = {each.__file__ for each in (deliverer, turns, worker, events)}
    codes = set()

    def struck(at):
        heard, left = [], [at]
        hub = Hub(lambda event: heard.append(event.attempt))

        def trace(frame, what, _):
            if frame.f_code.co_filename not in files:
                return None
            frame.f_trace_opcodes = True
            if what == "opcode":
                codes.add(frame.f_code.co_name)
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
            return trace

        was_struck = False
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            hub(numbered(0))
        except KeyboardInterrupt:
            was_struck = True
        finally:
            sys.settrace(before)
        in_threads(lambda: hub(numbered(1)))
        assert eventually(lambda: 1 in heard), f"instruction {at}: nothing is delivered any more"
        assert heard in ([0, 1], [1]), f"instruction {at}"
        return was_struck

    at = 1
    while struck(at):
        at += 1
    assert at > 100
    assert {"__call__", "note", "send", "take", "_drain", "_deliver"} <= codes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_by_another_thread_leaves_events_deliverable():
    """The same for interrupts as the interpreter delivers them, at a time of their own.

    One that comes while the collector cleans up goes nowhere, and is sent again.
    """
    hub = Hub(lambda event: heard.append(event.attempt))
    heard, struck, interrupt = [], 0, ctypes.pythonapi.PyThreadState_SetAsyncExc
    for number in range(200):
        start, end = threading.Event(), threading.Event()

        def body(start=start, end=end):
            sys.settrace(None)  # struck in its tracer, coverage would keep its lock for ever
            with contextlib.suppress(KeyboardInterrupt):
                start.set()
                while not end.is_set():
                    hub(numbered(-1))

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        assert start.wait(20)
        time.sleep(number % 7 * 1e-4)
        for _ in range(10):
            struck += interrupt(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
            thread.join(2)
            if not thread.is_alive():
                break
        assert not thread.is_alive(), "the interrupt has left it stuck"
        hub(numbered(number))
        assert eventually(lambda: number in heard), "nothing is delivered any more"  # noqa: B023
    assert struck >= 200


@pytest.mark.parametrize("listener", [None, Hub])
def test_circuit_and_gate_deliver_through_the_clients_own(listener):
    """There is one deliverer: what a circuit notes never overtakes what a call does."""
    heard = []
    hub = Hub(heard.append) if listener else None
    circuit = CircuitBreaker(CircuitPolicy(), listener=hub or heard.append)
    circuit.trip()
    if hub:
        hub(numbered(1))
    circuit.reset()
    kinds = [type(event).__name__ for event in heard]
    expected = ["CircuitOpened", "RetryScheduled", "CircuitClosed"]
    assert kinds == [each for each in expected if hub or each != "RetryScheduled"]


def test_a_listener_may_emit():
    """What a listener causes it hears after it has returned, in order."""
    heard, depth = [], []

    def listen(event):
        assert not depth
        depth.append(1)
        heard.append(event.attempt)
        if event.attempt < 3:
            hub(numbered(event.attempt + 1))
        depth.pop()

    hub = Hub(listen)
    hub(numbered(0))
    assert heard == [0, 1, 2, 3]


def test_a_listener_may_wait_for_a_thread_that_emits():
    """No lock is held while a listener runs."""
    heard = []

    def listen(event):
        heard.append(event.attempt)
        if event.attempt == 0:
            in_threads(lambda: hub(numbered(1)))

    hub = Hub(listen)
    hub(numbered(0))
    assert eventually(lambda: heard == [0, 1])


def test_a_failing_listener_breaks_nothing_and_is_logged_once(caplog):
    """A hook that raises is somebody's bug and no outage."""
    heard = []

    def listen(event):
        heard.append(event)
        raise ValueError("my fault")

    hub = Hub(listen)
    for number in range(3):
        hub(numbered(number))
    assert len(heard) == 3
    (record,) = caplog.records
    assert record.event == "dspy_resilient.listener_failed"
    assert record.client == "fast"
    assert record.exc_info[0] is ValueError


def test_what_is_no_error_of_a_listener_goes_through():
    """Ctrl-C in a listener stops the program, and the next event still arrives."""
    heard = []

    def listen(event):
        heard.append(event.attempt)
        if event.attempt == 0:
            raise KeyboardInterrupt

    hub = Hub(listen)
    with pytest.raises(KeyboardInterrupt):
        hub(numbered(0))
    hub(numbered(1))
    assert heard == [0, 1]


CHANGES = [
    *(CircuitOpened, CircuitHalfOpened, CircuitClosed),
    *(Throttled, WaitStarted, ClientRestarted),
    *(StoreLost, StoreFound),
]


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_of_state_is_one_line_with_its_name_and_facts(kind, caplog):
    """The event's name is fixed text and the facts are extra."""
    caplog.set_level(logging.DEBUG, logger="dspy_resilient")
    event = sample(kind)
    Hub()(event)
    (record,) = caplog.records
    assert record.name == "dspy_resilient"
    assert record.event.startswith("dspy_resilient.")
    assert record.event.replace("_", "").endswith(kind.__name__.lower())
    assert record.facts == dataclasses.asdict(event)
    assert record.getMessage().startswith(f"{record.event} client=fast target=openai/x")
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("kind", [each for each in KINDS if each not in CHANGES])
def test_what_one_call_met_is_not_logged(kind, caplog):
    """A log line per state change, never one per call."""
    caplog.set_level(logging.DEBUG, logger="dspy_resilient")
    Hub()(sample(kind))
    assert not caplog.records


def test_the_table_of_events_is_complete():
    """Each event is listed once, with the level of its line in the log or none."""
    rows = re.findall(r"^    ([A-Z]\w+) .* (-|info|warning)$", events.__doc__, flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(kind.__name__ for kind in KINDS)
    logged = {name for name, level in rows if level != "-"}
    assert logged == {kind.__name__ for kind in KINDS if Hub().wants(kind)}


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self):
        return True


def shown(monkeypatch, *kinds, handler=None, level=logging.INFO, terminal=None):
    """Return what stands on a terminal after these events, in a program with only this logging."""
    logger = logging.Logger("dspy_resilient", level)  # noqa: LOG001  # alone, without a root
    if handler is not None:
        logger.addHandler(handler)
    monkeypatch.setattr(events, "logger", logger)
    with contextlib.redirect_stderr(terminal or Terminal()) as stderr:
        for kind in kinds:
            Hub()(sample(kind))
    return stderr.getvalue()


def test_a_long_wait_is_seen_once_without_any_logging(monkeypatch):
    """Python's own last resort writes warnings to the terminal."""
    (line,) = shown(monkeypatch, WaitStarted).splitlines()
    assert line.startswith("dspy_resilient.wait_started client=fast")
    assert "ends=14:03:25" in line


def test_a_long_wait_is_seen_though_the_log_goes_to_a_file(monkeypatch, tmp_path):
    """A run at a terminal must not seem hung."""
    with contextlib.closing(logging.FileHandler(tmp_path / "log")) as handler:
        text = shown(monkeypatch, WaitStarted, Throttled, handler=handler)
    assert len(text.splitlines()) == 1
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_long_wait_is_not_said_twice(monkeypatch):
    """Where the log is shown on the terminal, its line is enough."""
    terminal = Terminal()
    text = shown(
        monkeypatch, WaitStarted, handler=logging.StreamHandler(terminal), terminal=terminal
    )
    assert text.count("wait_started") == 1


def test_a_progress_bar_is_not_broken_by_a_long_wait(monkeypatch):
    """The line stands above the bar, which is drawn again below it."""
    terminal = Terminal()
    with tqdm(total=9, file=terminal, ncols=40) as bar:
        bar.update()
        shown(monkeypatch, WaitStarted, terminal=terminal)
    pieces = re.split(r"[\r\n]", terminal.getvalue())
    (line,) = [piece for piece in pieces if "wait_started" in piece]
    assert line.startswith("dspy_resilient.wait_started")
    after = terminal.getvalue().partition(line)[2]
    assert after.startswith("\n")
    assert "1/9" in after


def logfmt(line):
    """Read a line as a collector of logs would."""
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "=]*)(?: |$)', line.partition(" ")[2])
    assert " ".join(f"{name}={value}" for name, value in pairs) == line.partition(" ")[2]
    return {n: re.sub(r"\\(.)", r"\1", v[1:-1]) if v[:1] == '"' else v for n, v in pairs}


@pytest.mark.parametrize(
    "text", ["plain", "two words", 'a "b" c', "back\\slash", "k=v", "", "ä\nb"]
)
def test_a_line_of_the_log_is_logfmt(caplog, text):
    """What holds space, quotes or an equals sign is quoted, and nothing breaks the line."""
    event = CircuitOpened(client=text or "-", at=1.0, reason=text, seconds=2.0, last_error=text)
    Hub()(event)
    facts = logfmt(caplog.records[0].getMessage())
    assert facts["reason"] == facts["last_error"] == text.replace("\n", "\N{REPLACEMENT CHARACTER}")
    assert facts["seconds"] == "2"
    assert facts["target"] == "-"


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_a_row(kind):
    """Name and facts, ready for JSON, with the time of day."""
    event = sample(kind)
    row = json.loads(json.dumps(event.to_dict()))
    assert row.pop("event").replace("_", "") == kind.__name__.lower()
    assert row == dataclasses.asdict(event)
    assert abs(row["wall"] - datetime.now(UTC).timestamp()) < 60  # noqa: TID251
    assert event == dataclasses.replace(event, wall=0.0)


def test_silence_is_kept(monkeypatch):
    """Neither a program that wants no warnings nor one without a terminal hears anything."""
    keep = logging.NullHandler()
    assert not shown(monkeypatch, WaitStarted, handler=keep, level=logging.ERROR)
    assert not shown(monkeypatch, WaitStarted, handler=keep, terminal=io.StringIO())
    assert shown(monkeypatch, WaitStarted, handler=keep)


def test_trouble_is_a_warning_and_its_end_is_not(caplog):
    """An operator's filter by level finds what needs a look."""
    caplog.set_level(logging.DEBUG, logger="dspy_resilient")
    for kind in CHANGES:
        Hub()(sample(kind))
    levels = {record.event.rpartition(".")[2]: record.levelno for record in caplog.records}
    assert levels == {
        "circuit_opened": logging.WARNING,
        "throttled": logging.WARNING,
        "wait_started": logging.WARNING,
        "client_restarted": logging.WARNING,
        "store_lost": logging.WARNING,
        "circuit_half_opened": logging.INFO,
        "circuit_closed": logging.INFO,
        "store_found": logging.INFO,
    }


def test_nobody_listening_costs_nothing():
    """Without a listener only what is logged is wanted."""
    assert [kind for kind in KINDS if Hub().wants(kind)] == [
        kind for kind in KINDS if kind in CHANGES
    ]
    assert all(Hub(print).wants(kind) for kind in KINDS)
    assert not Hub().wants(CallFinished)
    assert not Hub().wants(FellBack)


def test_a_renewed_hub_delivers_again():
    """A fork in the middle of a delivery leaves the child able to deliver, and nothing doubled."""
    entered, go_on, heard = threading.Event(), threading.Event(), []

    def listen(event):
        heard.append(event.attempt)
        if event.attempt == 0:
            entered.set()
            go_on.wait(20)

    hub = Hub(listen)
    stuck = threading.Thread(target=lambda: hub(numbered(0)), daemon=True)
    stuck.start()
    assert entered.wait(20)
    hub(numbered(1))
    hub.renew()  # what happens in the child, whose parent will deliver number 1
    hub(numbered(2))
    assert heard == [0, 2]
    go_on.set()
    stuck.join(20)
    assert heard == [0, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_listener_may_fork():
    """The child of a listener goes on from there."""
    heard = []

    def listen(event):
        heard.append(event.attempt)
        if event.attempt == 0 and os.fork() == 0:
            hub.renew()

    hub = Hub(listen)
    parent = os.getpid()
    try:
        hub(numbered(0))
        hub(numbered(1))
    finally:
        if os.getpid() != parent:
            os._exit(0 if heard == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    assert heard == [0, 1]
