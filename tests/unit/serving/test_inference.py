"""A thread that may be late: whoever waits goes on, and it is not asked again until it is free."""

from __future__ import annotations

import threading

import pytest

from serving.inference import InferenceThread, LateError


@pytest.fixture
def thread() -> InferenceThread:
    return InferenceThread("test")


def test_results_and_errors_come_back_from_a_thread_of_its_own(thread: InferenceThread) -> None:
    assert thread.call(threading.get_ident, 60.0) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0, 60.0)
    assert [thread.call(lambda number=number: number, 60.0) for number in range(200)] == list(range(200))
    thread.close()


def test_a_late_call_is_left_alone_and_its_answer_is_nobodys(thread: InferenceThread) -> None:
    gate = threading.Event()
    with pytest.raises(LateError):
        thread.call(lambda: gate.wait(60.0), 0.001)
    assert thread.busy
    with pytest.raises(LateError):
        thread.call(lambda: "new", 60.0)
    gate.set()
    while thread.busy:
        pass
    assert thread.call(lambda: "new", 60.0) == "new"
    thread.close()


def test_without_time_nothing_is_begun(thread: InferenceThread) -> None:
    begun: list[int] = []
    with pytest.raises(LateError):
        thread.call(lambda: begun.append(1), 0.0)
    thread.call(lambda: None, 60.0)
    assert begun == []
    thread.close()


def test_close_ends_the_thread_also_after_a_late_call() -> None:
    gate, late = threading.Event(), InferenceThread("late")
    with pytest.raises(LateError):
        late.call(lambda: gate.wait(60.0), 0.001)
    late.close()
    gate.set()
    idle = InferenceThread("idle")
    idle.close()
    idle.close()
    for one in (late, idle):
        one._thread.join(60.0)
        assert not one._thread.is_alive()
