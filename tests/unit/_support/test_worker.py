"""The thread that reads and writes files for event loops."""

import os
import threading

import pytest

from dspy_resilient._support.worker import Worker

PATIENCE = 10


def test_work_is_done_in_order_on_one_thread_of_its_own():
    """The thread starts with the first piece of work, and nothing runs on the caller's."""
    before = set(threading.enumerate())
    worker = Worker("test")
    assert set(threading.enumerate()) <= before
    results = [worker.do(threading.get_ident) for _ in range(20)]
    threads = {result.result(PATIENCE) for result in results}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_callers_that_start_together_start_one_thread():
    """However many loops ask first, there is one thread."""
    worker, start = Worker("test"), threading.Barrier(16)
    found = []

    def caller():
        start.wait(PATIENCE)
        found.append(worker.do(threading.get_ident).result(PATIENCE))

    crew = [threading.Thread(target=caller) for _ in range(16)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join(PATIENCE)
    assert len(found) == 16
    assert len(set(found)) == 1


def test_error_goes_to_whoever_waits_and_the_thread_goes_on():
    """A fault ends neither the thread nor anybody else's work."""
    worker = Worker("test")

    def fault():
        raise SystemExit

    with pytest.raises(SystemExit):
        worker.do(fault).result(PATIENCE)
    assert worker.do(lambda: "done").result(PATIENCE) == "done"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_has_a_thread_of_its_own():
    """The parent's thread does not exist in a child, and is not waited for there."""
    worker = Worker("test")
    worker.do(int).result(PATIENCE)
    child = os.fork()
    if child == 0:
        try:
            done = worker.do(lambda: "done").result(PATIENCE)
        finally:
            os._exit(0 if done == "done" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_thread_without_work_ends_and_another_takes_over():
    """A client that is not used any more keeps no thread."""
    worker = Worker("test", idle=0.01)
    thread = worker.do(threading.current_thread).result(PATIENCE)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert worker.do(lambda: "done").result(PATIENCE) == "done"
