"""Shows how far the encoder stage is: a bar on a terminal, a log line now and then elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from shoal.udfs.progress import ProgressReceiver

REFRESH_SECONDS = 0.25
LOG_SECONDS = 10.0
MAX_POINTS = 200

Points = list[tuple[float, int, int]]


@contextmanager
def shown_progress(
    receiver: ProgressReceiver,
    num_chunks: int,
    num_done: int,
    started: float,
    console: Console,
    say: Callable[[str], None],
) -> Iterator[Points]:
    """Shows progress until the block ends; gives (seconds since `started`, chunks, tokens), thinned to MAX_POINTS.

    num_done: chunks of the plan that needed no encoding; the bar counts on from there. started: as time.time().
    """
    shown = _Shown(receiver, num_chunks, num_done, started, console, say)
    show = shown.bar if console.is_terminal and not console.is_dumb_terminal else shown.lines
    thread = threading.Thread(target=show, name="shoal-progress", daemon=True)
    thread.start()
    try:
        yield shown.points
    finally:
        shown.stop.set()
        thread.join()
        shown.note()
        del shown.points[: -MAX_POINTS or None]


@dataclass
class _Shown:
    receiver: ProgressReceiver
    num_chunks: int
    num_done: int
    started: float
    console: Console
    say: Callable[[str], None]
    points: Points = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def note(self) -> tuple[int, int]:
        """Chunks and tokens so far, kept as a point of the curve."""
        totals = self.receiver.totals()
        self.points.append((round(time.time() - self.started, 2), totals.chunks, totals.tokens))
        if len(self.points) > 2 * MAX_POINTS:
            self.points[:] = self.points[::2]
        return totals.chunks, totals.tokens

    def bar(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("chunks  {task.fields[rates]}"),
            TimeRemainingColumn(),
        )
        began = time.monotonic()
        with Progress(*columns, console=self.console, transient=True) as progress:
            total = self.num_done + self.num_chunks
            task = progress.add_task("encode", total=total, completed=self.num_done, rates="")
            last_point = 0.0
            while not self.stop.wait(REFRESH_SECONDS):
                totals = self.receiver.totals()
                now = time.monotonic()
                if now - last_point >= 1:
                    self.note()
                    last_point = now
                rates = _rates(totals.chunks, totals.tokens, now - began)
                progress.update(task, completed=self.num_done + totals.chunks, rates=rates)

    def lines(self) -> None:
        began = time.monotonic()
        while not self.stop.wait(LOG_SECONDS):
            chunks, tokens = self.note()
            seconds = time.monotonic() - began
            left = f", about {(self.num_chunks - chunks) * seconds / chunks:.0f} s left" if chunks else ""
            done, total = self.num_done + chunks, self.num_done + self.num_chunks
            self.say(f"encoding: {done} of {total} chunks, {_rates(chunks, tokens, seconds)}{left}")


def _rates(chunks: int, tokens: int, seconds: float) -> str:
    return f"{chunks / seconds:,.0f} chunks/s, {tokens / seconds:,.0f} tokens/s"
