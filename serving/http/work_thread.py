"""A thread beside the event loop: what takes long runs there, one call after the other, and health checks go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class OverloadError(Exception):
    """The thread did not get to a call in time; it was not made."""


class WorkThread:
    """Runs calls for coroutines of any event loop; handing over is cheaper than with a pool of one thread."""

    def __init__(self, name: str, max_wait: float) -> None:
        """Start. Args: max_wait: seconds until a call must have begun."""
        self.name, self.max_wait = name, max_wait
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of `function(*arguments)`, which runs in the thread.

        Raises: OverloadError if it did not begin in time, and then it never does; whatever the function raises.
        """
        loop = asyncio.get_running_loop()
        call = _Call(function, arguments, loop)
        expiry = loop.call_later(self.max_wait, call.expire)
        self._calls.put(call)
        try:
            result: T = await call.future
        finally:
            expiry.cancel()
        return result

    def close(self) -> None:
        """End the thread after the calls that wait already; give up on one that does not end."""
        self._calls.put(None)
        self._thread.join(self.max_wait)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call.make()


class _Call:
    __slots__ = ("arguments", "claim", "function", "future", "loop")

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.function, self.arguments, self.loop = function, arguments, loop
        self.future: asyncio.Future[Any] = loop.create_future()
        # Taken once: by the thread that makes the call, or by whoever gives it up.
        self.claim = threading.Lock()

    def expire(self) -> None:
        if self.claim.acquire(blocking=False):
            self._finish(None, OverloadError())

    def make(self) -> None:
        if self.future.cancelled() or not self.claim.acquire(blocking=False):
            return
        result, error = None, None
        try:
            result = self.function(*self.arguments)
        except Exception as caught:  # raised again where it is awaited
            error = caught
        # The loop may be gone: a server that was told to stop waits only so long.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._finish, result, error)

    def _finish(self, result: Any, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)
