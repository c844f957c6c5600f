"""A thread that computes, so that whoever waits for it may stop waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class LateError(Exception):
    """There was no answer in time; the thread still computes, and is busy until it is done."""


class InferenceThread:
    """Runs one call at a time in a thread of its own; for one caller at a time."""

    def __init__(self, name: str) -> None:
        self._wake = _signal()
        self._job: _Job | None = None
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a call that nobody waits for any more still runs."""
        return self._busy

    def call(self, function: Callable[[], T], timeout: float) -> T:
        """The result of `function`, which runs in the thread.

        Args: timeout: seconds.
        Raises: LateError without a result in time, or at once while busy; whatever `function` raises.
        """
        if self._busy or timeout <= 0.0:
            raise LateError
        job = _Job(function)
        self._job, self._busy = job, True
        self._wake.release()
        if not job.done.acquire(timeout=timeout):
            raise LateError
        if job.error is not None:
            raise job.error
        return cast(T, job.result)

    def close(self) -> None:
        """End the thread after the call that runs; twice does nothing."""
        if not self._closed:
            self._closed = True
            if not self._busy:
                self._wake.release()

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            job, self._job = self._job, None
            if job is not None:
                try:
                    job.result = job.function()
                except BaseException as error:
                    job.error = error
                self._busy = False
                job.done.release()
            if self._closed:
                return


class _Job:
    __slots__ = ("done", "error", "function", "result")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = _signal()
        self.result: Any = None
        self.error: BaseException | None = None


def _signal() -> threading.Lock:
    # A lock held until somebody releases it is the cheapest signal; semaphores are written in Python.
    lock = threading.Lock()
    lock.acquire()
    return lock
