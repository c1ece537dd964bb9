"""A progress bar in bytes on stderr; without a terminal it says nothing."""

from __future__ import annotations

from types import TracebackType

from cachefs.units import short_size


class ByteBar:
    """Done of *total* bytes, rate and time left, with a text of the caller's behind them."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._total = total
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} % {task.fields[text]}", markup=False),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, text="")

    def __enter__(self) -> ByteBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, *, what: str, text: str) -> None:
        """*done* bytes of all so far. what: before the bar; text: behind the sizes."""
        sizes = f"{short_size(done)} of {short_size(self._total)}, {text}"
        self._progress.update(self._task, completed=done, description=what, text=sizes)

    def say(self, text: str) -> None:
        """A line on stderr that stays, above the bar."""
        self._progress.console.print(text, soft_wrap=True, highlight=False, markup=False)
