"""Progress of a run on standard error: one bar per stage, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

Advance = Callable[..., None]
"""Called with (done, total) and optionally a note."""


def silent(done: int, total: int, note: str | float = "") -> None:
    """Show nothing."""


class StageProgress:
    """Handle of a running stage; call it with (done, total) and, if useful, a note."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def __call__(self, done: int, total: int, note: str | float = "") -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            text = f"{note:.4f}" if isinstance(note, float) else note
            self._progress.update(self._task, completed=done, total=total, note=text)


class Reporter:
    """Shows stages and records their durations in `timings` (seconds by stage name).

    Args: quiet suppresses everything; standard error is used so that standard output stays machine-readable.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.timings: dict[str, float] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            disable=quiet,
        )
        self._depth = 0

    @contextmanager
    def stage(self, name: str, note: str = "") -> Iterator[StageProgress]:
        """Run a block as a named stage."""
        if self._depth == 0:
            self._progress.start()
        self._depth += 1
        task = self._progress.add_task(name, total=None, note=note)
        began = time.perf_counter()
        try:
            yield StageProgress(self._progress, task)
            total = self._progress.tasks[self._progress.task_ids.index(task)].total or 1
            self._progress.update(task, total=total, completed=total)
        finally:
            self._progress.stop_task(task)
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - began
            self._depth -= 1

    def close(self) -> None:
        """Stop drawing; the bars stay on screen."""
        self._progress.stop()
